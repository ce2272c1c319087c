"""The manifest of a Megatron checkpoint directory, and the check that its files are those that were written.

step_12/
  SHA256SUMS                  of every other file, readable by `sha256sum --check`
  manifest.json               this module's `Manifest`
  model/rank_00000.safetensors      parameters of each rank of the first replica, under Megatron's names
  optimizer/rank_00000.safetensors  float32 main weights and Adam moments (training checkpoints only)
  rng/rank_00000.safetensors        random generators of every rank (training checkpoints only)
  config.yaml                 the recipe (training checkpoints only)
  huggingface/                config, tokenizer and the other small files of the model
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_aspo.common.errors import UserError
from megatron_aspo.weights.layout import ParallelSizes

FORMAT = 1
MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_CHUNK = 4 << 20


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`."""

    architecture: str
    """`architectures` entry of the Hugging Face config."""
    dtype: str
    """Element type of the parameters."""
    naming: str
    """`local | transformer_engine`: whose parameter names the files use."""
    sizes: ParallelSizes
    tensors: dict[str, str]
    """Hugging Face tensor → SHA-256 of its bytes, row-major and little-endian, in `dtype`."""
    training: dict[str, Any] = field(default_factory=dict)
    """The state, beside tensors, from which a run resumes; empty in a converted checkpoint."""
    format: int = FORMAT


def write_manifest(directory: Path, manifest: Manifest, known: dict[str, str]) -> None:
    """Write `manifest.json` and `SHA256SUMS`. known: relative path → SHA-256 of files that were hashed while they were written."""
    (directory / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n", encoding="utf-8")
    if odd := next((name for name in _files(directory) if "\n" in name), None):
        raise UserError(f"{odd!r} has a line break in its name, which {SUMS} cannot list; rename the file in the model's directory")
    if lost := known.keys() - set(_files(directory)):
        raise UserError(f"{directory / min(lost)} was written but is not there: all processes need the same file system")
    sums = {name: known.get(name) or sha256_of(directory / name) for name in _files(directory)}
    (directory / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()), encoding="utf-8")


def is_checkpoint(directory: Path) -> bool:
    """Return whether this is a Megatron checkpoint, possibly damaged, rather than a Hugging Face directory."""
    return (directory / MANIFEST).exists() or (directory / "huggingface").is_dir()


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of a complete checkpoint, after checking that no file is missing, added or changed.

    Raises UserError naming the first such file.
    """
    manifest, whole = open_manifest(directory)
    whole()
    return manifest


def open_manifest(directory: Path) -> tuple[Manifest, Callable[[], None]]:
    """Return the manifest, and a function that waits for the hashes of the tensor files, which a thread checks meanwhile.

    The function raises UserError for a damaged file, as this one does for a damaged small file or list of files.
    """
    if not is_checkpoint(directory):
        raise UserError(f"{directory} is no checkpoint of ours: it has no {MANIFEST}; name a directory such as checkpoints/step_10")
    try:
        lines = (directory / SUMS).read_bytes().decode().split("\n")
        expected = {match[2]: match[1] for line in lines[:-1] if (match := _LINE.fullmatch(line))}
        if lines[-1] or len(expected) != len(lines) - 1:
            raise ValueError("a line of it is not a hash and a name")
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / SUMS} is damaged or missing ({error}): the checkpoint cannot be trusted") from error
    present = _files(directory)
    for name in sorted(expected.keys() ^ set(present)):
        state = "is missing" if name in expected else f"is not listed in {SUMS}"
        raise UserError(f"{directory / name} {state}: the checkpoint is not what was written")
    small = [name for name in present if not name.endswith(".safetensors")]
    _check_sums(directory, {name: expected[name] for name in small})
    pool = ThreadPoolExecutor(1)
    large = pool.submit(_check_sums, directory, {name: expected[name] for name in present if name not in small})
    pool.shutdown(wait=False)
    return load_manifest(directory), large.result


def _check_sums(directory: Path, expected: dict[str, str]) -> None:
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(expected, pool.map(lambda name: sha256_of(directory / name), expected), strict=True):
            if digest != expected[name]:
                raise UserError(f"{directory / name} is damaged: its SHA-256 is not the one in {SUMS}")


def load_manifest(directory: Path) -> Manifest:
    """Return the manifest without checking the other files."""
    values = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    if values.get("format") != FORMAT:
        raise UserError(
            f"{directory / MANIFEST} has format {values.get('format')}, this version reads {FORMAT}: use the version that wrote it"
        )
    return Manifest(**values | {"sizes": ParallelSizes(**values["sizes"])})


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _files(directory: Path) -> list[str]:
    paths: Iterable[Path] = directory.rglob("*")
    return sorted(str(p.relative_to(directory)) for p in paths if not p.is_dir() and str(p.relative_to(directory)) != SUMS)
