"""The model under evaluation: a Hugging Face directory or hub name, a checkpoint, a run, or an OpenAI-compatible endpoint."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_aspo.checkpoint.find import find_checkpoints
from megatron_aspo.checkpoint.manifest import is_checkpoint, sha256_of
from megatron_aspo.common.errors import UserError
from megatron_aspo.hf.model_directory import find_torch_dist, resolve_model
from megatron_aspo.hf.small_files import stated_dtype


@dataclass(frozen=True)
class Target:
    """A model to evaluate. Exactly one of directory, checkpoint and endpoint is set."""

    directory: Path | None = None
    """Hugging Face directory."""
    checkpoint: Path | None = None
    """Megatron checkpoint of a run or of `megatron-aspo convert`, or the directory of tensors of a `torch_dist` checkpoint."""
    endpoint: str = ""
    """Base URL of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1."""
    run: Path | None = None
    """The run directory that the model belongs to, if any."""

    @property
    def name(self) -> str:
        path = self.checkpoint or self.directory
        return str(path) if path else self.endpoint

    @property
    def step(self) -> int | None:
        """The training step in the path's last part, such as step_10 or global_step_10; None if there is none."""
        path = self.checkpoint or self.directory
        found = re.fullmatch(r"(?:global_)?step_(\d+)", path.name) if path else None
        return int(found[1]) if found else None


def find_target(name: str) -> Target:
    """Return the target called `name`, without fetching or reading a model. Raises UserError if there is nothing to evaluate."""
    if re.match(r"https?://", name):
        return Target(endpoint=name.rstrip("/"))
    path = Path(name).expanduser()
    if torch_dist := find_torch_dist(path):
        resolve_model(name)  # it has config and tokenizer, or is refused
        return Target(checkpoint=torch_dist.resolve())
    if is_checkpoint(path):
        return Target(checkpoint=path.resolve(), run=_run_of(path.resolve()))
    if (path / "config.yaml").is_file() and not (path / "config.json").exists():
        return _newest(path.resolve())
    directory = resolve_model(name)
    return Target(directory=directory, run=_run_of(directory))


def _newest(run: Path) -> Target:
    """Return the final model of a run, else its newest checkpoint."""
    exports = {int(path.name.removeprefix("step_")): path for path in run.glob("exports/step_*") if path.name[5:].isdigit()}
    checkpoints = find_checkpoints(run)
    newest = max([*exports, *checkpoints], default=None)
    if newest is None:
        raise UserError(f"{run} has neither a checkpoint nor an exported model; wait for one, or set checkpoint.every in its recipe")
    return Target(exports[newest], run=run) if newest in exports else Target(checkpoint=checkpoints[newest], run=run)


def _run_of(path: Path) -> Path | None:
    """Return the run whose checkpoints/ or exports/ contains the path, if any."""
    run = path.parent.parent
    return run if path.parent.name in ("checkpoints", "exports") and (run / "config.yaml").is_file() else None


@contextmanager
def hugging_face(target: Target, beside: Path) -> Iterator[Path]:
    """Yield the target's Hugging Face directory. A checkpoint is converted into `beside`, which is removed at the end.

    A killed process leaves `beside` behind, and the next one reuses it.
    """
    if target.directory:
        yield target.directory
        return
    if target.checkpoint is None:
        raise ValueError(f"{target} has no files of a model")
    from megatron_aspo.checkpoint.convert import convert, open_source
    from megatron_aspo.weights.layout import ParallelSizes

    if not beside.exists():
        convert(open_source(target.checkpoint), beside, to="huggingface", sizes=ParallelSizes())
    yield beside
    shutil.rmtree(beside)


def model_sha256(directory: Path) -> str:
    """Return a digest of weights, config and generation config of a Hugging Face directory."""
    digest = hashlib.sha256()
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("config.json"), *directory.glob("generation_config.json")])
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"{directory} has no safetensors files; name a Hugging Face model directory with its weights")
    for file in files:
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def check_positions(directory: Path, max_model_len: int) -> None:
    """Raise UserError if prompt and response together exceed the model's positions."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    positions = config.get("max_position_embeddings")
    if positions is not None and max_model_len > positions:
        raise UserError(
            f"data.max_prompt_tokens + max_response_tokens = {max_model_len} is more than the {positions} positions of {directory}; lower "
            "one of them with --set"
        )


def vocabulary(directory: Path) -> int:
    """Return the rows of the model's embedding. Raises UserError if config.json does not state them."""
    try:
        return int(json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory}/config.json has no readable vocab_size; name the directory of a model") from error


def engine_dtype(directory: Path) -> str:
    """Return the element type of the model's tensors if engines support it, else bfloat16."""
    stated = stated_dtype(directory)
    return stated if stated in ("float32", "bfloat16") else "bfloat16"
