"""`megatron-aspo convert`: checks the command line and runs the conversion."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_aspo.checkpoint.convert import Source, convert, open_source
from megatron_aspo.checkpoint.manifest import is_checkpoint
from megatron_aspo.common.errors import UserError
from megatron_aspo.data.tokenizer_export import auto_tokenizer_note
from megatron_aspo.hf.model_directory import find_torch_dist
from megatron_aspo.hf.writer import SHARD_BYTES
from megatron_aspo.weights.layout import LayoutError, ModelDims, ParallelSizes, check_divisible

_LAYOUT = ("tensor_parallel", "pipeline_parallel", "virtual_pipeline", "expert_parallel", "expert_tensor_parallel", "naming")


def run_convert(parsed: argparse.Namespace) -> None:
    """Convert `parsed.source`. Raises UserError for anything that the user can cure; then no target is left."""
    # Copying and comparing are limited by memory bandwidth: torch's threads would only compete with those that hash.
    torch.set_num_threads(1)
    path = Path(parsed.source).expanduser()
    from_hugging_face = find_torch_dist(path) is None and not is_checkpoint(path)
    to = parsed.to or ("megatron" if from_hugging_face else "huggingface")
    target = parsed.target.expanduser().absolute()
    _check(parsed, from_hugging_face, to, target)
    sizes = _sizes(parsed)
    source = open_source(parsed.source, parsed.dtype, parsed.config_from)
    if to == "megatron":
        _check_layout(source.model.dims, sizes)
    verify = None
    if parsed.verify:
        from megatron_aspo.checkpoint.verify import verify
    convert(
        source,
        target,
        to=to,
        sizes=sizes,
        naming=parsed.naming or "local",
        dtype=parsed.dtype,
        shard_bytes=int(min((parsed.max_shard_gb or SHARD_BYTES / 1e9) * 1e9, 2**63)),
        verify=verify,
    )
    ranks = f", {sizes.world} ranks" if to == "megatron" else ""
    model = source.model
    print(f"{parsed.target}: {model.architecture}, {len(model.tensor_shapes)} tensors, {parsed.dtype or source.dtype}{ranks}")
    for note in _notes(source, to, target):
        print(f"note: {note}")


def _notes(source: Source, to: str, target: Path) -> Iterator[str]:
    """Yield notes on data that the target format cannot hold and on fields that other programs interpret differently."""
    if to == "huggingface" and (note := auto_tokenizer_note(target)):
        yield note
    if to == "torch_dist":
        if (source.directory / "optimizer").is_dir():
            yield "the optimizer, the random generators and the position in the data stay behind: a run resumes from the source alone"
        if source.model.rope_scaling is not None:
            yield "its arguments do not say how config.json scales the rotary embeddings: give Megatron-LM the options for it"


def _check(parsed: argparse.Namespace, from_hugging_face: bool, to: str, target: Path) -> None:
    """Raise UserError for mistakes that show before the source is read, which takes long."""
    given = [f"--{name.replace('_', '-')}" for name in _LAYOUT if getattr(parsed, name) is not None]
    if to == "huggingface" and given:
        raise UserError(f"{given[0]} is about a Megatron target, but {parsed.target} is to be a Hugging Face directory; leave it out")
    if to == "torch_dist" and (cut := [option for option in given if option != "--naming"]):
        raise UserError(f"{cut[0]} is about --to megatron: a torch_dist checkpoint is loaded at any layout; leave it out")
    if parsed.max_shard_gb is not None and (to != "huggingface" or not parsed.max_shard_gb * 1e9 >= 1):
        raise UserError(f"--max-shard-gb {parsed.max_shard_gb} is about a Hugging Face target and must be above 0; leave it out")
    if parsed.verify and from_hugging_face == (to == "huggingface"):
        raise UserError("--verify compares transformers with Megatron-Core, and needs Hugging Face on one side; leave it out")
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; choose another name, or remove it")


def _sizes(parsed: argparse.Namespace) -> ParallelSizes:
    tensor, expert = parsed.tensor_parallel or 1, parsed.expert_parallel or 1
    expert_tensor = parsed.expert_tensor_parallel or tensor
    return ParallelSizes(
        tensor=tensor,
        pipeline=parsed.pipeline_parallel or 1,
        # Experts are sharded over the ranks of a stage: add as many data-parallel replicas as they need.
        data=math.lcm(tensor, expert * expert_tensor) // tensor,
        virtual=parsed.virtual_pipeline or 1,
        expert=expert,
        expert_tensor=expert_tensor,
    )


def _check_layout(dims: ModelDims, sizes: ParallelSizes) -> None:
    """Raise UserError, in the words of this command, when the model cannot be cut this way."""
    try:
        check_divisible(dims, sizes)
    except LayoutError as error:
        raise error.worded(lambda name, value: f"--{name.replace('_', '-')} {value}") from None
