"""A `torch_dist` checkpoint as the initial model of a run: it is converted to Hugging Face at its first use, and the copy is kept.

Engines and transformers load only Hugging Face directories. The copy is inside the checkpoint and moves with it:

release/ or iter_0000010/
  hugging_face_model/
    source.json   size and time of change of each file of the checkpoint when it was converted
    model/        the Hugging Face directory
"""

import json
from pathlib import Path

from megatron_aspo.common.atomic import new_directory
from megatron_aspo.common.errors import UserError

_COPY, _SOURCE = "hugging_face_model", "source.json"


def find_copy(torch_dist: Path) -> Path | None:
    """Return the Hugging Face directory of this checkpoint, None if it was not converted yet.

    Raises UserError if the checkpoint has changed since its conversion.
    """
    copy = torch_dist / _COPY
    if not copy.exists():
        return None
    try:
        recorded = json.loads((copy / _SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        recorded = None
    if recorded != _files(torch_dist):
        raise UserError(f"{copy} was made from other files than {torch_dist} has now: remove it, and it is made again")
    return copy / "model"


def hugging_face_copy(torch_dist: Path) -> Path:
    """Return the Hugging Face directory of this checkpoint, converting it first if necessary.

    The conversion is atomic and verified against the source. If two runs convert concurrently, one uses the other's copy.
    """
    if copy := find_copy(torch_dist):
        return copy
    try:
        from megatron_aspo.checkpoint.convert import convert, open_source  # imports torch.distributed.checkpoint: 0.3 s that `plan` saves

        with new_directory(torch_dist / _COPY) as directory:
            (directory / _SOURCE).write_text(json.dumps(_files(torch_dist), indent=1) + "\n", encoding="utf-8")
            convert(open_source(torch_dist), directory / "model", to="huggingface")
    except UserError as error:
        if copy := find_copy(torch_dist):
            return copy
        raise UserError(
            f"engines need {torch_dist} in Hugging Face format, but {error}; or convert it to a directory of your choice (megatron-aspo "
            f"convert {torch_dist} TARGET) and set model=TARGET"
        ) from error
    return torch_dist / _COPY / "model"


def _files(torch_dist: Path) -> dict[str, list[int]]:
    """Return name → [bytes, modification time in ns] of the checkpoint's files, config and tokenizer included."""
    files = [path for top in (torch_dist, torch_dist / "huggingface") if top.is_dir() for path in top.iterdir() if path.is_file()]
    return {str(path.relative_to(torch_dist)): [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)}
