"""Prompts on disk, so that no process holds gigabytes of tests: an unnamed SQLite database that is deleted with its process.

Ground truth and extra fields stay compressed until the reward's process unpacks them.
"""

import hashlib
import pickle
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.records import Prompt

_CODEC = "lz4"
_MAX_VALUE_BYTES = 999_000_000
"""Upper bound on one row's compressed ground truth: SQLite stores values below 10**9 bytes. LiveCodeBench's largest has 0.1 GB."""
_PREPARE = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA page_size = 16384;
CREATE TABLE prompts (
    position INTEGER PRIMARY KEY, split TEXT, id TEXT, location TEXT, number INTEGER, known_as TEXT, data_source TEXT, tokens BLOB,
    text TEXT, hash BLOB, answer BLOB
);
"""


@dataclass(frozen=True)
class PackedAnswer:
    """The ground truth and extra fields of one prompt, pickled together and compressed."""

    data: bytes
    size: int
    """Bytes when decompressed."""


class PromptStore:
    """A collection of prompts that are added once, then read by position, in any order and from any thread.

    SQLite puts the file among temporary files, in TMPDIR, /var/tmp or /tmp. It has no name and so disappears with its process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._digest = hashlib.sha256()
        self._count = 0
        self._database = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._database.executescript(_PREPARE + "BEGIN;")

    def add(self, split: str, where: str, prompt: Prompt, known_as: str) -> None:
        """Store a prompt at the next position. where: file and line; known_as: what identifies the problem in every file, or empty.

        Raises UserError if the disk is full or the ground truth is too large.
        """
        import pyarrow as pa

        answer = pickle.dumps((prompt.ground_truth, prompt.extra), protocol=5)
        tokens = np.array(prompt.token_ids, dtype=np.int32).tobytes()
        self._digest.update(f"{split} {prompt.id} {prompt.data_source} {len(tokens)} {len(answer)} ".encode() + tokens)
        self._digest.update(answer)
        packed = pa.compress(answer, _CODEC, asbytes=True)
        if len(packed) > _MAX_VALUE_BYTES:
            raise UserError(f"{where}: the ground truth has {len(packed) / 1e9:.1f} GB compressed, over 1 GB; leave the row out")
        key = hashlib.blake2b(tokens or prompt.text.encode(), digest_size=16).digest()
        blob = len(answer).to_bytes(8, "little") + packed
        row = (self._count, split, prompt.id, where, prompt.position, known_as, prompt.data_source, tokens, prompt.text, key, blob)
        with _disk_errors():
            self._database.execute(f"INSERT INTO prompts VALUES ({', '.join('?' * len(row))})", row)
        self._count += 1

    def __len__(self) -> int:
        return self._count

    @property
    def sha256(self) -> str:
        """A digest of all prompts with their ground truths, in order."""
        return self._digest.hexdigest()

    def read(self, position: int) -> Prompt:
        """Return the prompt at a position. The reward's data is not loaded yet: `with_packed_answer` does that."""
        columns = "id, tokens, text, data_source, number"
        ((name, tokens, text, source, number),) = self.query(f"SELECT {columns} FROM prompts WHERE position = ?", position)
        return Prompt(name, tuple(np.frombuffer(tokens, np.int32).tolist()), text, StoredAnswer(self, position), source, {}, number)

    def query(self, statement: str, *values: Any) -> list[tuple]:
        """Return the rows of a SELECT."""
        with self._lock, _disk_errors():
            return self._database.execute(statement, values).fetchall()


@dataclass(frozen=True)
class StoredAnswer:
    """Handle for the ground truth of a stored prompt; valid in the process that has the store."""

    store: PromptStore
    position: int

    def read(self) -> PackedAnswer:
        ((blob,),) = self.store.query("SELECT answer FROM prompts WHERE position = ?", self.position)
        return PackedAnswer(blob[8:], int.from_bytes(blob[:8], "little"))


def with_packed_answer(prompt: Prompt) -> Prompt:
    """Return a stored prompt with its packed answer, as sent to a reward's process; return any other prompt unchanged."""
    answer = prompt.ground_truth
    return replace(prompt, ground_truth=answer.read()) if isinstance(answer, StoredAnswer) else prompt


def with_answer(prompt: Prompt) -> Prompt:
    """Return the prompt as its reward sees it, with ground truth and extra fields."""
    answer = with_packed_answer(prompt).ground_truth
    if not isinstance(answer, PackedAnswer):
        return prompt
    import pyarrow as pa

    truth, extra = pickle.loads(pa.decompress(answer.data, answer.size, _CODEC, asbytes=True))
    return replace(prompt, ground_truth=truth, extra=extra)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise UserError(
            f"the prompts cannot be kept in a temporary file ({error}); free some disk, or set the environment variable TMPDIR to a "
            "directory on a disk with as much free space as the data files have"
        ) from error
