"""From the name of a model to the local directory that every process loads it from."""

from pathlib import Path

from megatron_aspo.common.errors import UserError

# Files at the top of a repository; not the copies in other formats that some keep in subfolders.
WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def resolve_model(model: str | Path) -> Path:
    """The absolute local directory of `model`: a Hugging Face directory, or a hub name whose files are fetched into the hub's cache.

    Called once, by the driver: what it returns is passed on, so that no other process asks the hub.
    Raises UserError if the directory is missing or has no config.json, or if the hub cannot give the files.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise UserError(f"model={model}: the directory has no config.json; name a Hugging Face model directory")
        return directory.resolve()
    if directory.exists():
        raise UserError(f"model={model} is a file; name the Hugging Face model directory it belongs to")
    if str(model).startswith((".", "/", "~")):
        raise UserError(f"model={model}: there is no such directory; name a Hugging Face model directory or hub name")
    return _fetch_from_hub(str(model))


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
