"""The files beside the weights: config, generation config, tokenizer, chat template; carried through every conversion."""

import json
import shutil
from pathlib import Path

_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf", ".pt", ".pth", ".h5", ".msgpack")


_TEMPLATES = "additional_chat_templates"
"""Folder in which transformers keeps the chat templates beyond the first."""


def copy_small_files(source: Path, target: Path, dtype: str | None, *, skip: tuple[str, ...] = ()) -> None:
    """Copy every file of a model directory that holds no weights, byte for byte, but that config.json then says `dtype`, if one is given.

    A SHA256SUMS is left out: it speaks of files that the target cuts otherwise.
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
    # Older configs say torch_dtype; readers of either take `dtype`.
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def stated_dtype(directory: Path) -> str | None:
    """The element type that a model's config.json states, as torch names it."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config.get("dtype", config.get("torch_dtype"))
