"""`megatron-aspo convert`: from the words of the command line to a conversion."""

import argparse
import math
import re
from pathlib import Path

import torch

from megatron_aspo.checkpoint.convert import convert, open_source
from megatron_aspo.checkpoint.hf_writer import SHARD_BYTES
from megatron_aspo.checkpoint.manifest import is_checkpoint
from megatron_aspo.data.tokenizer_export import auto_tokenizer_note
from megatron_aspo.errors import UserError
from megatron_aspo.weights.layout import ModelDims, ParallelSizes, check_divisible

_LAYOUT = ("tensor_parallel", "pipeline_parallel", "virtual_pipeline", "expert_parallel", "expert_tensor_parallel", "naming")


def run_convert(parsed: argparse.Namespace) -> None:
    """Raises UserError for anything that the user can cure; then no target is left."""
    # Copying and comparing wait for memory: threads of torch's would only spin beside the ones that hash.
    torch.set_num_threads(1)
    from_megatron = is_checkpoint(Path(parsed.source).expanduser())
    to_megatron = parsed.to == "megatron" if parsed.to else not from_megatron
    target = parsed.target.expanduser().absolute()
    _check(parsed, from_megatron, to_megatron, target)
    sizes = _sizes(parsed)
    source = open_source(parsed.source, parsed.dtype)
    if to_megatron:
        _check_layout(source.model.dims, sizes)
    verify = None
    if parsed.verify:
        from megatron_aspo.checkpoint.verify import verify
    convert(
        source,
        target,
        to_megatron=to_megatron,
        sizes=sizes,
        naming=parsed.naming or "local",
        dtype=parsed.dtype,
        shard_bytes=int(min((parsed.max_shard_gb or SHARD_BYTES / 1e9) * 1e9, 2**63)),
        verify=verify,
    )
    ranks = f", {sizes.world} ranks" if to_megatron else ""
    model = source.model
    print(f"{parsed.target}: {model.architecture}, {len(model.tensor_shapes)} tensors, {parsed.dtype or source.dtype}{ranks}")
    if not to_megatron and (note := auto_tokenizer_note(target)):
        print(f"note: {note}")


def _check(parsed: argparse.Namespace, from_megatron: bool, to_megatron: bool, target: Path) -> None:
    """What can be refused before the source is read, which takes long."""
    given = [f"--{name.replace('_', '-')}" for name in _LAYOUT if getattr(parsed, name) is not None]
    if given and not to_megatron:
        raise UserError(f"{given[0]} is about a Megatron target, but {parsed.target} is to be a Hugging Face directory; leave it out")
    if parsed.max_shard_gb is not None and (to_megatron or not parsed.max_shard_gb * 1e9 >= 1):
        raise UserError(f"--max-shard-gb {parsed.max_shard_gb} is about a Hugging Face target and must be above 0; leave it out")
    if parsed.verify and from_megatron == to_megatron:
        raise UserError("--verify compares a Hugging Face directory with a Megatron checkpoint; source and target are of one kind")
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; choose another name, or remove it")


def _sizes(parsed: argparse.Namespace) -> ParallelSizes:
    tensor, expert = parsed.tensor_parallel or 1, parsed.expert_parallel or 1
    expert_tensor = parsed.expert_tensor_parallel or tensor
    return ParallelSizes(
        tensor=tensor,
        pipeline=parsed.pipeline_parallel or 1,
        # Experts are spread over the ranks of a stage: as many data-parallel replicas as they need.
        data=math.lcm(tensor, expert * expert_tensor) // tensor,
        virtual=parsed.virtual_pipeline or 1,
        expert=expert,
        expert_tensor=expert_tensor,
    )


def _check_layout(dims: ModelDims, sizes: ParallelSizes) -> None:
    """As a run does, but in the words of this command."""
    try:
        check_divisible(dims, sizes)
    except UserError as error:
        said = re.sub(r"trainer\.(\w+)=", lambda match: f"--{match[1].replace('_', '-')} ", str(error))
        raise UserError(said) from error
