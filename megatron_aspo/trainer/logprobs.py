"""Output projection and log-softmax without materialising the logits: hidden states in, log-probability and entropy of each target out.

The result is exact. Each rank walks its rows of the vocabulary in blocks, so that tokens × vocabulary logits never exist at once. A block
yields four softmax statistics per token, which are merged over the blocks and then over the tensor-parallel ranks. Backward walks the
blocks again and recomputes their logits, except those of the last block, which are still in the buffer. A block of rows gets its whole
gradient at once, so no accumulator of the output matrix's size is kept. Old, reference and current log-probabilities all come from here.

The two steps that read logits, `statistics` and `gradient_`, are `logprobs_torch.py` on CPU and `logprobs_triton.py` on CUDA.
"""

from functools import reduce
from importlib import import_module
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aspo.common.errors import UserError

_STEPS = {"cpu": "megatron_aspo.trainer.logprobs_torch", "cuda": "megatron_aspo.trainer.logprobs_triton"}
_ALIGNMENT = 128
"""Blocks are multiples of this many rows, which the matrix units prefer."""


def logprobs(
    hidden: Tensor,
    output_weight: Tensor,
    targets: Tensor,
    temperature: float,
    tp_group: dist.ProcessGroup | None,
    *,
    vocab: int,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Return log-softmax(hidden @ weightᵀ / temperature) at the targets, and the entropy of that distribution.

    hidden: [tokens, hidden size], the same on every rank of `tp_group`; output_weight: [rows, hidden size], this rank's rows of the
    output matrix, padding included; targets: int64 [tokens]; vocab: true vocabulary size, the softmax ignores rows beyond it.
    `tp_group` None means the matrix is whole. `chunk_tokens`: upper bound on the logits that exist at one time, in tokens, in hidden's
    dtype. Both results are float32 [tokens] (float64 for float64 input), the same on every rank. Gradients reach `hidden` (summed over
    the group) and this rank's rows of `output_weight`.
    """
    return _Logprobs.apply(hidden, output_weight, targets, temperature, tp_group, vocab, chunk_tokens)


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, tp_group, vocab, chunk_tokens):
        rank, size = (dist.get_rank(tp_group), dist.get_world_size(tp_group)) if tp_group is not None else (0, 1)
        start = rank * weight.shape[0]
        rows = min(weight.shape[0], vocab - start)
        if rows <= 0:
            raise ValueError(f"tensor-parallel rank {rank} of {size} holds no row of the vocabulary of {vocab}")
        steps = kernels(hidden.device)
        local_targets = targets - start
        blocks = _blocks(rows, hidden.shape[0], chunk_tokens)
        buffer = _buffer(hidden, blocks[0])

        def measure(block: slice) -> Tensor:
            logits = torch.mm(hidden, weight[block].t(), out=_part(buffer, block))
            return steps.statistics(logits, temperature, local_targets - block.start)

        # Block by block: each takes the buffer of the one before, and the logits of the last stay in it.
        peak, total, weighted, at_target = _merge_ranks(reduce(_merge, map(measure, blocks)), tp_group)

        ctx.save_for_backward(hidden, weight, local_targets, peak, total, weighted)
        ctx.steps, ctx.temperature, ctx.tp_group, ctx.blocks = steps, temperature, tp_group, blocks
        ctx.buffer = buffer
        ctx.set_materialize_grads(False)
        return at_target - peak - total.log(), total.log() - weighted / total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        """Return the gradients by hidden states and weights.

        With d = logit − peak and p = exp(d) / total, the gradient by a logit is onehot − p for the log-probability and
        −p · (d − weighted / total) for the entropy. With the upstream gradients: onehot · at_target + exp(d) · (offset + slope · d).
        """
        hidden, weight, local_targets, peak, total, weighted = ctx.saved_tensors
        at_target = torch.zeros_like(total) if grad_logprob is None else grad_logprob / ctx.temperature
        offset, slope = -at_target / total, None
        if grad_entropy is not None:
            slope = -grad_entropy / ctx.temperature / total
            offset -= slope * weighted / total
        grad_hidden = torch.zeros(hidden.shape, dtype=peak.dtype, device=hidden.device)
        grad_weight = torch.empty_like(weight)
        grad_weight[ctx.blocks[-1].stop :] = 0
        buffer, ctx.buffer = ctx.buffer, None  # absent in a second backward, which retain_graph allows
        in_buffer = ctx.blocks[-1] if buffer is not None else None
        buffer = _buffer(hidden, ctx.blocks[0]) if buffer is None else buffer
        for block in reversed(ctx.blocks):
            logits = _part(buffer, block)
            if block != in_buffer:
                torch.mm(hidden, weight[block].t(), out=logits)
            ctx.steps.gradient_(logits, ctx.temperature, local_targets - block.start, peak, offset, slope, at_target)
            torch.mm(logits.t(), hidden, out=grad_weight[block])
            if grad_hidden.dtype == hidden.dtype:
                grad_hidden.addmm_(logits, weight[block])
            else:
                grad_hidden += logits @ weight[block]
        _all_reduce(grad_hidden, ctx.tp_group, dist.ReduceOp.SUM)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None, None


def kernels(device: torch.device) -> ModuleType:
    """Return the module with the steps of the log-probabilities for this kind of device: in torch on a CPU, in Triton on CUDA.

    Raises UserError for any other kind of device, and if a package that the module imports is not installed.
    """
    if device.type not in _STEPS:
        raise UserError(f"log-probabilities on {device.type}: expected one of {', '.join(_STEPS)}")
    try:
        return import_module(_STEPS[device.type])
    except ModuleNotFoundError as missing:
        name = missing.name
        raise UserError(f"log-probabilities on {device.type} need {name}, which is not installed: pip install {name}") from missing


def _blocks(rows: int, tokens: int, chunk_tokens: int) -> list[slice]:
    """Return blocks of rows of equal size, the last may be smaller, each with at most the logits of `chunk_tokens` tokens."""
    size = max(1, min(rows, rows * chunk_tokens // max(tokens, 1)))
    if _ALIGNMENT < size < rows:
        size -= size % _ALIGNMENT
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _buffer(hidden: Tensor, block: slice) -> Tensor:
    """Return an uninitialized tensor for the logits of the first block, the largest."""
    return hidden.new_empty(hidden.shape[0], block.stop - block.start)


def _part(buffer: Tensor, block: slice) -> Tensor:
    """Return the beginning of `buffer` as a contiguous matrix [tokens, rows of `block`]."""
    tokens, rows = buffer.shape[0], block.stop - block.start
    return buffer.view(-1)[: tokens * rows].view(tokens, rows)


def _merge(one: Tensor, other: Tensor) -> Tensor:
    """Return the statistics [4, tokens] of the union of two parts of the vocabulary."""
    peak = torch.maximum(one[0], other[0])
    merged = _move(one, peak)
    merged[1:] += _move(other, peak)[1:]
    return merged


def _merge_ranks(found: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    peak = found[0].clone()
    _all_reduce(peak, group, dist.ReduceOp.MAX)
    merged = _move(found, peak)
    _all_reduce(merged[1:], group, dist.ReduceOp.SUM)
    return merged


def _move(found: Tensor, peak: Tensor) -> Tensor:
    """Return the statistics with their sums rescaled to another peak."""
    old, total, weighted, at_target = found
    shift = old - peak
    scale = shift.exp()
    return torch.stack([peak, scale * total, scale * (weighted + total * shift), at_target])


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)
