"""A formula for the memory of one engine worker, and whether its key-value cache can hold a request. In bytes; no vLLM."""

import math
from dataclasses import dataclass

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.host_memory import HEAP_HOLES
from megatron_aspo.hf.model import HFModel
from megatron_aspo.rollout.engine_layout import EngineHoldings
from megatron_aspo.rollout.engine_settings import GIB, batched_tokens
from megatron_aspo.rollout.options import RolloutOptions
from megatron_aspo.weights.layout import ITEMSIZE, volume

_FLOAT32 = 4


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


def check_cache(model: HFModel, options: RolloutOptions, max_model_len: int) -> None:
    """Raise UserError when the cache cannot hold one request: vLLM would refuse to start."""
    if (room := cached_tokens(model, options)) < max_model_len:
        needed = max_model_len * kv_bytes_per_token(model, options) * options.tensor_parallel / GIB
        raise UserError(
            f"rollout.kv_cache_gib={options.kv_cache_gib:g} holds the keys and values of {room:,} tokens, fewer than the "
            f"{max_model_len:,} of one prompt and response; raise it to {math.ceil(needed * 10) / 10:g}, or lower "
            "rollout.max_response_tokens"
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
