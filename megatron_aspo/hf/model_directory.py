"""Resolving the name of a model to the local directory from which every process loads it."""

import json
from pathlib import Path

from megatron_aspo.common.errors import UserError

# Files at the top level of a repository; some keep copies in other formats in subfolders.
WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
LATEST = "latest_checkpointed_iteration.txt"
"""Megatron-LM's file beside the iterations of a checkpoint; it names the newest."""


def resolve_model(model: str | Path) -> Path:
    """Return the absolute local directory that has the config and tokenizer of `model`.

    For a Hugging Face directory, and for a hub name, whose files are fetched into the hub's cache, it has the weights too. For a
    `torch_dist` checkpoint it is the directory `huggingface` that a conversion writes beside the tensors.
    Called once, by the driver: what it returns is passed on, so that no other process asks the hub.
    Raises UserError if the directory is missing or has no config.json, or if the hub cannot give the files.
    """
    directory = Path(model).expanduser()
    if torch_dist := find_torch_dist(directory):
        if not (torch_dist / "huggingface" / "config.json").is_file():
            raise UserError(
                f"model={model}: the checkpoint has no Hugging Face config and tokenizer, as Megatron-LM writes none; run `megatron-aspo "
                f"convert {model} TARGET --config-from MODEL` with a model that has them, and name TARGET"
            )
        return (torch_dist / "huggingface").resolve()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise UserError(f"model={model}: the directory has no config.json; name a Hugging Face model directory")
        return directory.resolve()
    if directory.exists():
        raise UserError(f"model={model} is a file; name the Hugging Face model directory it belongs to")
    if str(model).startswith((".", "/", "~")):
        raise UserError(f"model={model}: there is no such directory; name a Hugging Face model directory or hub name")
    return _fetch_from_hub(str(model))


def find_torch_dist(path: Path) -> Path | None:
    """Return the directory that holds the tensors of this checkpoint, or iteration of one; None where it is no `torch_dist` checkpoint.

    Raises UserError when the checkpoint names an iteration that is not there, or is of another of Megatron's formats.
    """
    if (latest := path / LATEST).is_file():
        word = latest.read_text(encoding="utf-8").strip()
        directory = path / (f"iter_{int(word):07d}" if word.isdigit() else word)
        if (word not in ("release", "") and not word.isdigit()) or not (directory / "metadata.json").is_file():
            raise UserError(f"{latest} says {word!r}, but {directory} is no distributed checkpoint; name the iteration's directory instead")
        path = directory
    elif not ((path / "metadata.json").is_file() and (path / ".metadata").is_file()):
        return None
    try:
        backend = json.loads((path / "metadata.json").read_text(encoding="utf-8"))["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}/metadata.json is damaged ({error}); copy the checkpoint again") from error
    if backend != "torch_dist":
        raise UserError(f"{path} has the format {backend}; only torch_dist can be read: save it again with --ckpt-format torch_dist")
    return path


def _fetch_from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED_FILES, ignore_patterns=["*/*"]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model={name}: there is no such local directory, and the Hugging Face hub gave no such model ({reason}); "
            "check the name, the network and HF_TOKEN, or name a local directory"
        ) from error
