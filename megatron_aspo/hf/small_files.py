"""The files beside the weights (config, generation config, tokenizer, chat template), which every conversion copies."""

import json
import shutil
from pathlib import Path

_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf", ".pt", ".pth", ".h5", ".msgpack")


_TEMPLATES = "additional_chat_templates"
"""Folder in which transformers keeps further chat templates."""


def copy_small_files(source: Path, target: Path, dtype: str | None, *, skip: tuple[str, ...] = ()) -> None:
    """Copy every file of a model directory that holds no weights, byte for byte, and set `dtype` in config.json if one is given.

    SHA256SUMS is left out: it lists files that the target divides differently.
    """
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES) and file.name not in (*skip, "SHA256SUMS"):
            shutil.copyfile(file, target / file.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, target / _TEMPLATES)
    if dtype in (None, stated_dtype(target)):
        return
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    # Older configs have torch_dtype; readers of either accept `dtype`.
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def stated_dtype(directory: Path) -> str | None:
    """Return the element type in a model's config.json, as torch names it."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config.get("dtype", config.get("torch_dtype"))
