"""Checks that the model and the data are readable."""

import hashlib
import os
from pathlib import Path

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.sources import HUB
from megatron_aspo.doctor.record import Record, failed, ok, refused, warning
from megatron_aspo.hf.model_directory import find_torch_dist

_READ_BYTES = 1 << 16
_SHARE = "put it on a file system that all nodes share, or copy it to the same path on each node, readable for the user of Ray"


def check_model(model: str) -> Record:
    """Open every file of the model's directory and read its beginning. model: absolute path, or a hub name, which is not fetched."""
    directory = Path(model) if os.path.isabs(model) else cached_model(model)
    if directory is None:
        return warning("model", f"{model} is not in the cache of the Hugging Face hub", f"fetch it before the run: hf download {model}")
    try:
        if torch_dist := find_torch_dist(directory):
            directory = torch_dist
        parts = [*directory.iterdir(), *directory.glob("huggingface/*")] if torch_dist else directory.iterdir()
        files = sorted(path for path in parts if path.is_file())
        digest, total = hashlib.sha256(), 0
        for path in files:
            with path.open("rb") as file:
                start = file.read(_READ_BYTES)
            size = path.stat().st_size
            total += size
            digest.update(f"{path.name} {size} ".encode() + start)
    except UserError as error:
        return refused("model", error)
    except OSError as error:
        return failed("model", f"{error.filename or directory} cannot be read: {error.strerror or error}", _SHARE)
    if not any(path.name == "config.json" for path in files):
        return failed("model", f"{directory} has no config.json", "name a Hugging Face model directory")
    weights = sum(path.suffix in (".safetensors", ".distcp") for path in files)
    facts = {f"model {directory.name}": digest.hexdigest()[:12]}
    if not weights:
        return failed("model", f"{directory} holds no safetensors files", "copy the weights there too", facts)
    return ok("model", f"{len(files)} files, {total / 1e9:.2f} GB in {directory}", facts)


def check_data(locations: tuple[str, ...], needed: bool) -> Record:
    """Open the files of `data.path` and `data.eval_path`. needed: whether the run's command starts on this node, the only one to read
    them."""
    seen = 0
    for location in locations:
        if location.startswith(HUB):
            continue
        try:
            for path in _files(Path(location)):
                with path.open("rb") as file:
                    file.read(_READ_BYTES)
                seen += 1
        except OSError as error:
            detail = f"{error.filename or location} cannot be read: {error.strerror or error}"
            if needed:
                return failed("data", detail, _SHARE)
            return warning("data", detail, f"start the run where it can be read, or {_SHARE}")
    hub = sum(location.startswith(HUB) for location in locations)
    return ok("data", f"{seen} files can be read" + (f"; {hub} data sets of the hub are fetched at the start" if hub else ""))


def cached_model(name: str) -> Path | None:
    """Return the model's directory in the hub's cache, or None if it is not there. Fetches nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _files(path: Path) -> list[Path]:
    """Return the file itself, or all files below the directory; `@SPLIT` at the end of a directory's name is ignored."""
    if not path.exists() and "@" in path.name:
        path = path.with_name(path.name.rpartition("@")[0])
    if not path.is_dir():
        return [path]
    found: list[Path] = []

    def fail(error: OSError) -> None:
        raise error

    for directory, _, names in os.walk(path, onerror=fail):
        found += [Path(directory, name) for name in names]
    return sorted(found)
