"""Exports the live weights of the training ranks as a Hugging Face directory."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_aspo.common.atomic import new_directory
from megatron_aspo.hf.small_files import copy_small_files
from megatron_aspo.hf.tensor_meta import TensorMeta
from megatron_aspo.hf.writer import SHARD_BYTES, write_weights

if TYPE_CHECKING:
    from megatron_aspo.trainer.rank import TrainerRank


def write_export(
    target: Path, trainer: "TrainerRank", dtype: str, files: Mapping[str, str] | None = None, shard_bytes: int = SHARD_BYTES
) -> dict[str, str]:
    """Write the current weights to `target` on rank 0, atomically; return tensor → SHA-256 there. Collective over all ranks.

    Config, tokenizer and all other small files are those of the initial model, except `files` (name → text). In a `README.md` among
    `files`, `{hashes}` is replaced by a list of the tensors' hashes.
    """
    metas = trainer.tensor_metas(dtype)

    def tensors(shard: Sequence[TensorMeta]) -> Iterator[tuple[str, list[torch.Tensor]]]:
        for name, tensor in trainer.whole_tensors(shard):
            yield name, [tensor]

    if trainer.parallel.rank != 0:
        write_weights(None, metas, tensors, shard_bytes)
        return {}
    with new_directory(target) as directory:
        hashes: dict[str, str] = {}
        write_weights(directory, metas, tensors, shard_bytes, hashes)
        copy_small_files(trainer.hf.directory, directory, dtype, skip=("README.md",))
        for name, text in (files or {}).items():
            if name == "README.md":
                text = text.replace("{hashes}", "\n".join(f"{digest}  {tensor}" for tensor, digest in hashes.items()))
            (directory / name).write_text(text, encoding="utf-8")
    return hashes
