"""Writing a model as a Hugging Face directory that transformers and vLLM load unchanged: sharded safetensors and their index."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from megatron_aspo.hf.tensor_file import TensorFileWriter, sha256_of_parts
from megatron_aspo.hf.tensor_meta import TensorMeta, plan_buckets

SHARD_BYTES = 5 * 10**9

Tensors = Callable[[Sequence[TensorMeta]], Iterator[tuple[str, Sequence[torch.Tensor]]]]
"""Metas → iterator over (name, the parts of the tensor from top to bottom, in the meta's dtype), in the order of the metas."""


def write_weights(
    directory: Path | None,
    metas: Sequence[TensorMeta],
    tensors: Tensors,
    shard_bytes: int = SHARD_BYTES,
    hashes: dict[str, str] | None = None,
) -> None:
    """Write all tensors into `directory`, with one in memory at a time. hashes: receives Hugging Face tensor → SHA-256 of its bytes.

    directory=None: only iterate over `tensors`, as ranks that take part in the collective without writing do.
    """
    shards = plan_buckets(metas, shard_bytes)
    index = {}
    for number, shard in enumerate(shards, 1):
        if directory is None:
            for _ in tensors(shard):
                pass
            continue
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with TensorFileWriter(directory / file, shard, hashed=False) as writer:
            for name, parts in tensors(shard):
                parts = [part.cpu() for part in parts]
                writer.write(name, *parts)
                index[name] = file
                if hashes is not None:
                    hashes[name] = sha256_of_parts(parts)
            writer.close()
    if directory is not None and len(shards) > 1:
        text = json.dumps({"metadata": {"total_size": sum(meta.nbytes for meta in metas)}, "weight_map": index}, indent=2)
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
