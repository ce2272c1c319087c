"""The current weights as a Hugging Face directory that transformers and vLLM load as it is."""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from megatron_aspo.weights.buckets import plan_buckets

if TYPE_CHECKING:
    from megatron_aspo.trainer.rank import TrainerRank

SHARD_BYTES = 5 * 10**9
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack")


def write_checkpoint(directory: Path, trainer: "TrainerRank", dtype: str) -> None:
    """Collective over all ranks: rank 0 writes `directory`, all or nothing. Raises FileExistsError when it exists.

    Config, tokenizer and all other small files are those of the model that training started from; the weights are the current ones.
    """
    writes = trainer.parallel.rank == 0
    unfinished = directory.with_name(directory.name + ".unfinished")
    if writes:
        if directory.exists():
            raise FileExistsError(f"{directory} exists")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    shards = plan_buckets(trainer.tensor_metas(dtype), SHARD_BYTES)
    index = {}
    for number, metas in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {tensor_name: tensor.cpu().contiguous() for tensor_name, tensor in trainer.whole_tensors(metas)}
        if writes:
            save_file(tensors, unfinished / name, metadata={"format": "pt"})
            index |= dict.fromkeys(tensors, name)
    if not writes:
        return
    if len(shards) > 1:
        total = sum(meta.nbytes for metas in shards for meta in metas)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (unfinished / "model.safetensors.index.json").write_text(text)
    _copy_small_files(trainer.hf.directory, unfinished, dtype)
    for file in unfinished.iterdir():
        _sync(file)
    os.replace(unfinished, directory)
    _sync(directory.parent)


def _copy_small_files(source: Path, target: Path, dtype: str) -> None:
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES) and file.name != "README.md":
            shutil.copyfile(file, target / file.name)
    config = json.loads((target / "config.json").read_text())
    # Older configs say torch_dtype; readers of either take `dtype`.
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
