"""`megatron-aspo convert`: from the words of the command line to a conversion."""

import argparse
import math

from megatron_aspo.checkpoint.convert import convert, open_source
from megatron_aspo.checkpoint.hf_writer import SHARD_BYTES
from megatron_aspo.errors import UserError
from megatron_aspo.weights.layout import ParallelSizes

_LAYOUT = ("tensor_parallel", "pipeline_parallel", "virtual_pipeline", "expert_parallel", "expert_tensor_parallel", "naming")


def run_convert(parsed: argparse.Namespace) -> None:
    """Raises UserError for anything that the user can cure; then no target is left."""
    source = open_source(parsed.source, parsed.dtype)
    to_megatron = parsed.to == "megatron" if parsed.to else not source.megatron
    given = [f"--{name.replace('_', '-')}" for name in _LAYOUT if getattr(parsed, name) is not None]
    if given and not to_megatron:
        raise UserError(f"{given[0]} is about a Megatron target, but {parsed.target} is to be a Hugging Face directory; leave it out")
    if parsed.max_shard_gb is not None and (to_megatron or not parsed.max_shard_gb * 1e9 >= 1):
        raise UserError(f"--max-shard-gb {parsed.max_shard_gb} is about a Hugging Face target and must be above 0; leave it out")
    if parsed.verify and source.megatron == to_megatron:
        raise UserError("--verify compares a Hugging Face directory with a Megatron checkpoint; source and target are of one kind")
    expert, expert_tensor = parsed.expert_parallel or 1, parsed.expert_tensor_parallel or parsed.tensor_parallel or 1
    tensor = parsed.tensor_parallel or 1
    sizes = ParallelSizes(
        tensor=tensor,
        pipeline=parsed.pipeline_parallel or 1,
        # Experts are spread over the ranks of a stage: as many data-parallel replicas as they need.
        data=math.lcm(tensor, expert * expert_tensor) // tensor,
        virtual=parsed.virtual_pipeline or 1,
        expert=expert,
        expert_tensor=expert_tensor,
    )
    verify = None
    if parsed.verify:
        from megatron_aspo.checkpoint.verify import verify
    convert(
        source,
        parsed.target.expanduser().absolute(),
        to_megatron=to_megatron,
        sizes=sizes,
        naming=parsed.naming or "local",
        dtype=parsed.dtype,
        shard_bytes=int(min((parsed.max_shard_gb or SHARD_BYTES / 1e9) * 1e9, 2**63)),
        verify=verify,
    )
    layout = f", {sizes.world} ranks" if to_megatron else ""
    print(
        f"{parsed.target}: {source.model.architecture}, {len(source.model.tensor_shapes)} tensors, {parsed.dtype or source.dtype}{layout}"
    )
