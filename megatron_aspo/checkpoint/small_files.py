"""The files beside the weights: config, generation config, tokenizer, chat template; carried through every conversion."""

import json
import shutil
from pathlib import Path

_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf", ".pt", ".pth", ".h5", ".msgpack")


def copy_small_files(source: Path, target: Path, dtype: str, *, skip: tuple[str, ...] = ()) -> None:
    """Copy every file at the top of a model directory that holds no weights; config.json then says `dtype`.

    A SHA256SUMS is left out: it speaks of files that the target cuts otherwise.
    """
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES) and file.name not in (*skip, "SHA256SUMS"):
            shutil.copyfile(file, target / file.name)
    if stated_dtype(target) == dtype:
        return  # byte for byte
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    # Older configs say torch_dtype; readers of either take `dtype`.
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def stated_dtype(directory: Path) -> str | None:
    """The element type that a model's config.json states, as torch names it."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config.get("dtype", config.get("torch_dtype"))
