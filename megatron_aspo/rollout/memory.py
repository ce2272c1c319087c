"""A formula for the memory of one engine worker, and whether its key-value cache can hold a request. In bytes; no vLLM."""

import math
from dataclasses import dataclass, replace

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.host_memory import HEAP_HOLES
from megatron_aspo.hf.model import HFModel
from megatron_aspo.rollout.engine_layout import EngineHoldings
from megatron_aspo.rollout.engine_settings import GIB, batched_tokens
from megatron_aspo.rollout.options import RolloutOptions
from megatron_aspo.weights.layout import ITEMSIZE, volume

_FLOAT32, _MIB = 4, 1 << 20
_CHOSEN_REQUESTS = 8
"""Requests of full length for which `choose_cache` makes room. Most responses are shorter, so that several times as many run at a time."""
_BLOCKS_TOKENS = 64
"""Tokens that a request may leave unused in its last block, and in the block that vLLM keeps for itself."""


@dataclass(frozen=True)
class WorkerMemory:
    """Memory of the first worker of an engine, which holds the most, in bytes."""

    weights: int
    """As vLLM's loaders shard them. On a CPU a tied output head is stored twice: as the embedding, and packed for its product."""
    kv_cache: int
    incoming: int
    """At most two incoming buckets of weights, in whole shape, and the largest tensor once more: vLLM creates a new layer before it frees
    the old one."""
    batch: int
    """The largest batch: one layer's activations, and float32 of the size of the logits of all running requests five times: logits, a copy,
    log-probabilities, probabilities, random numbers. On a CPU including the holes that it leaves in the heap."""

    @property
    def total(self) -> int:
        """The sum, although engines do not generate and load weights at the same time: allocators keep what a batch used."""
        return self.weights + self.kv_cache + self.incoming + self.batch


def kv_bytes_per_token(model: HFModel, options: RolloutOptions) -> int:
    """Return the bytes of the keys and values of one token on one worker."""
    dims = model.dims
    heads = max(1, dims.kv_heads // options.tensor_parallel)
    return 2 * dims.layers * heads * dims.head_dim * ITEMSIZE[options.dtype]


def cached_tokens(model: HFModel, options: RolloutOptions) -> int:
    """Return the number of tokens that the key-value cache of an engine holds."""
    return int(options.kv_cache_gib * GIB) // options.tensor_parallel // kv_bytes_per_token(model, options)


def choose_cache(model: HFModel, options: RolloutOptions, max_model_len: int, room: int | None, on_cpu: bool) -> RolloutOptions:
    """Return the options with a key-value cache for eight requests of full length, or for as many, at least one, as there is room for.

    room: bytes of memory for one worker of an engine; None where it is not known, which then has room for all. Raises UserError when there
    is none for a single request.
    """
    request = (max_model_len + _BLOCKS_TOKENS) * kv_bytes_per_token(model, options)
    count = min(_CHOSEN_REQUESTS, options.max_running_requests)
    if room is not None:
        worker = worker_memory(model, options, 0, on_cpu, max_model_len)
        taken = worker.weights + worker.batch
        fitting = (room - taken) // request
        if fitting < 1:
            raise UserError(
                f"an engine's worker has {room / GIB:.1f} GiB of memory; the model takes {taken / GIB:.1f} of it, "
                f"and one prompt and response of {max_model_len:,} tokens {request / GIB:.1f}; set engine.tensor_parallel, or lower "
                "engine.engines, engine.max_running_requests or max_response_tokens"
            )
        count = min(count, fitting)
    return replace(options, kv_cache_gib=math.ceil(count * request * options.tensor_parallel / _MIB) * _MIB / GIB)


def check_cache(model: HFModel, options: RolloutOptions, max_model_len: int, section: str = "rollout.") -> None:
    """Raise UserError when the cache cannot hold one request: vLLM would refuse to start. section: the option's, for the message."""
    if (room := cached_tokens(model, options)) < max_model_len:
        needed = max_model_len * kv_bytes_per_token(model, options) * options.tensor_parallel / GIB
        raise UserError(
            f"{section}kv_cache_gib={options.kv_cache_gib:g} holds the keys and values of {room:,} tokens, fewer than the "
            f"{max_model_len:,} of one prompt and response; raise it to {math.ceil(needed * 10) / 10:g}, or lower "
            f"{section.replace('engine.', '')}max_response_tokens"
        )


def worker_memory(model: HFModel, options: RolloutOptions, bucket_bytes: int, on_cpu: bool, max_model_len: int) -> WorkerMemory:
    """Compute the memory of one worker; bucket_bytes: size of a transfer bucket."""
    holdings, itemsize = EngineHoldings(model.architecture, model.dims, options.sizes), ITEMSIZE[options.dtype]
    elements = 0
    for name in model.tensor_shapes:
        owners = holdings.of(name)
        elements += sum(volume(box) for box, ranks in zip(owners.boxes, owners.ranks, strict=True) if 0 in ranks)
    largest = max(math.prod(shape) for shape in model.tensor_shapes.values()) * itemsize
    whole = sum(math.prod(shape) for shape in model.tensor_shapes.values()) * itemsize
    dims = model.dims
    head = dims.vocab * dims.hidden // options.tensor_parallel if on_cpu and dims.tied else 0
    wide = (model.experts_per_token * dims.moe_ffn if dims.experts else dims.ffn) // options.tensor_parallel
    activations = batched_tokens(max_model_len, options.max_running_requests) * (4 * dims.hidden + 3 * wide) * itemsize
    logits = options.max_running_requests * dims.vocab * _FLOAT32
    return WorkerMemory(
        weights=(elements + head) * itemsize,
        kv_cache=int(options.kv_cache_gib * GIB) // options.tensor_parallel,
        incoming=min(whole, 2 * max(bucket_bytes, largest)) + largest,
        batch=int((activations + 5 * logits) * (HEAP_HOLES if on_cpu else 1)),
    )
