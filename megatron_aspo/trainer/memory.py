"""Memory of one training rank by formula, before anything is started: no torch, no process group.

Weights, gradients and optimizer state follow exactly from the layout. Activations per token are what the local layers keep for backward;
for experts and for Transformer Engine's layers that is an estimate. All sizes are in bytes.
"""

import math
from dataclasses import dataclass, fields

from megatron_aspo.common.host_memory import HEAP_HOLES
from megatron_aspo.hf.model import HFModel
from megatron_aspo.trainer.host_blocks import pinned_bytes
from megatron_aspo.trainer.options import TrainerOptions
from megatron_aspo.trainer.settings import RankSettings
from megatron_aspo.weights.layout import ITEMSIZE, Coordinates, Layout, ParallelSizes

_ADAM_BYTES = 8
"""Two moments in float32."""


@dataclass(frozen=True)
class RankMemory:
    """Memory of a rank at the peak of a training step, in bytes."""

    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    """On a CPU, with the holes that they leave in the heap."""
    reduction: int
    """On a CPU: gloo's copy of the gradients while it sums them over data-parallel ranks."""
    logprobs: int
    """Logits of one block, and the gradient of the output matrix."""
    checkpoint: int
    """The copy in host memory from which an asynchronous checkpoint is written."""
    pinned: int
    """Pinned host memory of state offloaded from a GPU."""

    @property
    def total(self) -> int:
        """The sum of all fields but `pinned`."""
        return sum(getattr(self, field.name) for field in fields(self)) - self.pinned


def parameter_counts(layout: Layout) -> tuple[int, int]:
    """Return the elements of a rank's parameters, padding included: of experts, and of all others."""
    counts = {name: math.prod(shape) for name, shape in layout.parameter_shapes.items()}
    experts = sum(count for name, count in counts.items() if name in layout.expert_parameters)
    return experts, sum(counts.values()) - experts


@dataclass(frozen=True)
class Load:
    """Upper bounds on one replica's work for a mini-batch."""

    tokens: int
    """Tokens of the largest micro-batch, over all context-parallel ranks."""
    micro_batches: int


def rank_memory(
    model: HFModel, layout: Layout, settings: RankSettings, at: Coordinates, load: Load, on_gpu: bool, asynchronous: bool
) -> RankMemory:
    """Return the memory of the rank at these coordinates, which holds `layout`. asynchronous: checkpoints are written from a copy."""
    options, sizes = settings.trainer, settings.sizes
    experts, others = parameter_counts(layout)
    count, itemsize = experts + others, ITEMSIZE[options.dtype]
    shards = sizes.data * sizes.context if options.distributed_optimizer else 1
    expert_shards = max(1, sizes.stage // (sizes.expert * sizes.expert_tensor_size)) if options.distributed_optimizer else 1
    owned = others // shards + experts // expert_shards
    state = owned * (_ADAM_BYTES + (4 if itemsize < 4 else 0))
    weights = count * itemsize
    # Transformer Engine keeps two FP8 copies of the factors of matrix products: plain, and transposed for backward.
    factors = sum(math.prod(shape) for name, shape in layout.parameter_shapes.items() if _is_factor(name)) if options.fp8 != "none" else 0
    away = on_gpu and options.offload_optimizer
    tokens = -(-load.tokens // sizes.context)
    gradients = count * ITEMSIZE[options.gradient_dtype]
    activations = _activations(model, options, sizes, at, tokens, load.micro_batches)
    return RankMemory(
        weights=weights + 2 * factors,
        reference=weights + factors if settings.algorithm.has_kl and not (on_gpu and options.offload_reference) else 0,
        gradients=gradients,
        # In host memory it comes to the device for the optimizer step, when there are no activations.
        optimizer=0 if away else state,
        activations=activations if on_gpu else int(activations * HEAP_HOLES),
        reduction=0 if on_gpu or sizes.data * sizes.context == 1 else gradients,
        logprobs=_logprobs(model, options, sizes, tokens) if at.pipeline == sizes.pipeline - 1 else 0,
        checkpoint=(weights + state) if asynchronous else 0,
        pinned=_pinned(layout, settings, shards, expert_shards) if on_gpu else 0,
    )


def _is_factor(name: str) -> bool:
    """Return whether Transformer Engine multiplies by this parameter of a layer in FP8."""
    return ".linear_" in name and "weight" in name.rpartition(".")[2] and "layer_norm" not in name


def _pinned(layout: Layout, settings: RankSettings, shards: int, expert_shards: int) -> int:
    """Return the bytes that offloaded optimizer state and reference weights take in pinned blocks (trainer/offload.py)."""
    options = settings.trainer
    itemsize = ITEMSIZE[options.dtype]
    counts = {name: math.prod(shape) for name, shape in layout.parameter_shapes.items()}
    state, reference = [], []
    if options.offload_optimizer:
        for name, count in counts.items():
            owned = -(-count // (expert_shards if name in layout.expert_parameters else shards))
            state += [4 * owned] * (2 + (itemsize < 4))
    if options.offload_reference and settings.algorithm.has_kl:
        reference = [itemsize * count for count in counts.values()]
    return pinned_bytes(state) + pinned_bytes(reference)


def kept_per_token(model: HFModel, options: TrainerOptions, tensor: int, expert_tensor: int) -> float:
    """Return the elements that one layer keeps for the backward pass of one token, on one of `tensor` ranks.

    They are: the inputs of the attention and feed-forward halves, each with its normalized copy and one scale; query, key and value, and
    the rotated query and key; with a norm of queries and keys, a copy of the queries and the scales; the attention output as its kernel
    and as the next matrix product holds it, with one log-sum-exp per head; gate and up; their product. With recomputation only the inputs
    of the recomputed part are kept: for core attention a copy of the queries, keys and values.
    """
    dims = model.dims
    heads, keys = dims.heads / tensor, max(1.0, dims.kv_heads / tensor)
    spread = tensor if options.sequence_parallel else 1
    if options.recompute == "full":
        return dims.hidden / spread
    residual = 4 * dims.hidden / spread + 2
    fused, turned, result = (heads + 2 * keys) * dims.head_dim, (heads + keys) * dims.head_dim, heads * dims.head_dim
    attention = fused + turned + result + (heads * dims.head_dim + heads + keys if dims.qk_norm else 0)
    inside = result + heads
    if dims.experts:
        # Each copy of a token: what an expert is given, gate and up, their product, and what it gives; and the router's shares.
        feed_forward = model.experts_per_token * (2 * dims.hidden + 3 * dims.moe_ffn / expert_tensor) + 3 * dims.experts
    else:
        feed_forward = 3 * dims.ffn / tensor
    if options.recompute == "selective":
        return residual + attention + (0 if dims.qk_norm else heads * dims.head_dim - turned)
    return residual + attention + inside + feed_forward


def _activations(model: HFModel, options: TrainerOptions, sizes: ParallelSizes, at: Coordinates, tokens: int, micro_batches: int) -> int:
    dims, itemsize = model.dims, ITEMSIZE[options.dtype]
    layers = dims.layers // (sizes.pipeline * sizes.virtual)
    # All layers share one table of cosines and sines.
    elements = kept_per_token(model, options, sizes.tensor, sizes.expert_tensor_size) * layers + 2 * dims.head_dim
    in_flight = tokens * chunks_in_flight(sizes, at, micro_batches)
    return int((elements * in_flight + _backward_workspace(model, options, sizes, tokens)) * itemsize)


def chunks_in_flight(sizes: ParallelSizes, at: Coordinates, micro_batches: int) -> int:
    """Return the most micro-batches × model chunks whose activations a stage of the one-forward-one-backward schedule keeps at once."""
    if sizes.virtual == 1:
        return min(sizes.pipeline - at.pipeline, micro_batches)
    warm_up = 2 * (sizes.pipeline - at.pipeline - 1) + (sizes.virtual - 1) * sizes.pipeline
    return min(warm_up + 1, micro_batches * sizes.virtual)


def _backward_workspace(model: HFModel, options: TrainerOptions, sizes: ParallelSizes, tokens: int) -> float:
    """Return the elements of the layer whose backward pass runs: its gradients and its recomputed activations."""
    dims = model.dims
    wide = model.experts_per_token * dims.moe_ffn / sizes.expert_tensor_size if dims.experts else dims.ffn / sizes.tensor
    gradients = tokens * (2 * dims.hidden + 3 * wide)
    if options.recompute == "none":
        return gradients
    again = TrainerOptions(sequence_parallel=options.sequence_parallel)
    return gradients + tokens * kept_per_token(model, again, sizes.tensor, sizes.expert_tensor_size)


def _logprobs(model: HFModel, options: TrainerOptions, sizes: ParallelSizes, tokens: int) -> int:
    dims, itemsize = model.dims, ITEMSIZE[options.dtype]
    rows = -(-dims.vocab // sizes.tensor)
    block = min(tokens, options.logprob_chunk_tokens) * rows
    # Hidden states of the response tokens, their gradient in float32; the block, with its exponentials in float32.
    return int(tokens * dims.hidden * (itemsize + 4) + block * (itemsize + 4) + rows * dims.hidden * itemsize)
