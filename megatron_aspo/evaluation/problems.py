"""The checked problems of an evaluation: prompts with their ground truths, and a digest of them."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_aspo.common.errors import UserError, nearest
from megatron_aspo.data.encoder import Message
from megatron_aspo.data.records import Prompt
from megatron_aspo.data.sources import Row, read_rows
from megatron_aspo.data.store import PromptStore, with_answer
from megatron_aspo.evaluation.options import EvalSettings
from megatron_aspo.rewards.choice import RewardChoice
from megatron_aspo.tasks.benchmarks import KINDS, TEMPLATES, Kind, Template, read_benchmark, read_template
from megatron_aspo.tasks.dataset import EVAL, Loader
from megatron_aspo.tasks.layouts import WANTED
from megatron_aspo.tasks.task import build_task

if TYPE_CHECKING:
    from megatron_aspo.data.encoder import PromptEncoder


@dataclass(frozen=True)
class Problems:
    prompts: Sequence[Prompt]
    messages: dict[tuple[int, ...], list[Message] | str]
    """Token ids of a prompt → its messages, or its text if it is not a chat."""
    sha256: str
    """Digest of ids, messages and ground truths; token ids are not included."""
    counts: dict[str, int]
    """Number of rows read, and of rows left out by reason."""


class RecordingEncoder:
    """Encodes as `encoder` does and records the texts. Without an encoder each text gets a number instead of tokens."""

    def __init__(self, encoder: "PromptEncoder | None", system_prompt: str):
        self._encoder, self._system_prompt = encoder, system_prompt
        self.messages: dict[tuple[int, ...], list[Message] | str] = {}

    def chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        ids = self._encoder.chat(messages) if self._encoder else None  # it adds the system prompt itself
        if self._system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._system_prompt}, *messages]
        return self._record(ids, list(messages))

    def text(self, text: str) -> tuple[int, ...]:
        return self._record(self._encoder.text(text) if self._encoder else None, text)

    def check_options_used(self) -> None:
        if self._encoder:
            self._encoder.check_options_used()

    def _record(self, ids: tuple[int, ...] | None, asked: list[Message] | str) -> tuple[int, ...]:
        ids = (len(self.messages),) if ids is None else ids
        self.messages[ids] = asked
        return ids


def load_problems(settings: EvalSettings, encoder: "PromptEncoder | None", accept_count: bool) -> Problems:
    """Read and check all problems. encoder: None when nothing is generated or an endpoint tokenizes.

    Raises UserError for a faulty row, for a number of problems other than `settings.problems`, unless accept_count, and for an option of
    chat prompts that changes none of them.
    """
    recorder = RecordingEncoder(encoder, settings.data.system_prompt)
    counts: dict[str, int] = {}
    if settings.task == "dataset":
        prompts = _load_files(settings, recorder, counts)
    else:
        prompts = build_task(settings.task, settings.data, recorder, settings.seed).held_out()
        counts["read"] = len(prompts)
    if not prompts:
        raise UserError(f"task={settings.task} holds out no problems; raise data.held_out_prompts")
    if settings.problems and len(prompts) != settings.problems and not accept_count:
        left_out = "".join(f", {count} {reason}" for reason, count in counts.items() if reason != "read")
        raise UserError(
            f"this evaluation has {settings.problems} problems, here are {len(prompts)} ({counts['read']} rows read{left_out}); name all "
            "files of the data set and no other, or accept another number with --accept-count"
        )
    digest = hashlib.sha256()
    for prompt in prompts:
        answered = with_answer(prompt)
        asked = [prompt.id, prompt.data_source, recorder.messages[prompt.token_ids], answered.ground_truth]
        digest.update(json.dumps(asked, sort_keys=True, ensure_ascii=False, default=repr).encode() + b"\n")
    recorder.check_options_used()
    return Problems(prompts, recorder.messages, digest.hexdigest(), counts)


def _load_files(settings: EvalSettings, recorder: RecordingEncoder, counts: dict[str, int]) -> list[Prompt]:
    if not settings.data.eval_path:
        raise UserError("there are no problems; name their files with --data")
    if not RewardChoice(settings.data):
        raise UserError("nothing says how responses are graded; set data.reward, such as data.reward=code")
    store = PromptStore()
    parts = Loader(store, settings.data, recorder, lambda location: rows_of(settings, location, counts)).load(EVAL, settings.data.eval_path)
    counts |= {"too long": too_long} if (too_long := sum(part.too_long for part in parts)) else {}
    return [store.read(position) for position in range(len(store))]


def rows_of(settings: EvalSettings, location: str, counts: dict[str, int]) -> Iterator[Row]:
    """Yield the selected rows of a location, each with its prompt. counts: gets the rows `read` and left out by reason added."""
    if settings.kind:
        kind, template = _kind(settings)
        yield from read_benchmark(kind, location, template, counts)
        return
    for row in read_rows(location, WANTED):
        counts["read"] = counts.get("read", 0) + 1
        yield row


def _kind(settings: EvalSettings) -> tuple[Kind, Template]:
    if settings.kind not in KINDS:
        raise UserError(f"kind={settings.kind} is not known; {nearest(settings.kind, KINDS)}")
    kind = KINDS[settings.kind]
    first, last = settings.first_date or kind.first, settings.last_date or kind.last
    for name, day in (("first_date", first), ("last_date", last)):
        try:
            if day:
                date.fromisoformat(day)
        except ValueError as error:
            raise UserError(f"{name}={day} is not a date such as 2024-08-01") from error
    if first and last and first > last:
        raise UserError(f"first_date={first} is after last_date={last}; exchange them")
    name = settings.template or kind.template
    if name not in TEMPLATES and not Path(name).expanduser().is_file():
        raise UserError(f"template={name} is neither a file nor a template; {nearest(name, TEMPLATES)}")
    template = TEMPLATES[name] if name in TEMPLATES else read_template(Path(name).expanduser())
    return replace(kind, first=first, last=last), template
