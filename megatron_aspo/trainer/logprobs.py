"""The seam after the model: hidden states in, log-probability and entropy of each target token out.

Exact and vocabulary-parallel. A rank walks its rows of the vocabulary in blocks, so that tokens × vocabulary never exists at once. A block
is to the rank what the rank is to its group: each gives four numbers per token, merged first over the blocks, then over the ranks. Backward
walks the blocks again and makes their logits anew, except the last one's, which are still there. A block of rows gets its whole gradient at
one time, so no sum of the output matrix's size is kept. Old, reference and current log-probabilities all come from here.

The two steps that read logits, `statistics` and `gradient_`, are `logprobs_torch.py` on CPU and `logprobs_triton.py` on CUDA.
"""

from importlib import import_module
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aspo.common.errors import UserError

_STEPS = {"cpu": "megatron_aspo.trainer.logprobs_torch", "cuda": "megatron_aspo.trainer.logprobs_triton"}
_ALIGNMENT = 128
"""Blocks are multiples of so many rows, for the matrix units' sake."""


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
    """Log-softmax(hidden @ weightᵀ / temperature) at the targets, and the entropy of that distribution.

    hidden: [tokens, hidden size], the same on every rank of `tp_group`; output_weight: [rows, hidden size], this rank's rows of the
    output matrix, padding included; targets: int64 [tokens]; vocab: true vocabulary size, rows beyond it do not exist for the softmax.
    `tp_group` None means the matrix is whole. `chunk_tokens`: as many logits exist at one time as so many tokens have, in hidden's dtype.
    Returns two float32 tensors [tokens] (float64 for float64 input), the same on every rank. Gradients reach `hidden` (summed over the
    group) and this rank's rows of `output_weight`.
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
        found = None
        for block in blocks:
            logits = torch.mm(hidden, weight[block].t(), out=_part(buffer, block))
            more = steps.statistics(logits, temperature, local_targets - block.start)
            found = more if found is None else _merge(found, more)
        peak, total, weighted, at_target = _merge_ranks(found, tp_group)

        ctx.save_for_backward(hidden, weight, local_targets, peak, total, weighted)
        ctx.steps, ctx.temperature, ctx.tp_group, ctx.blocks = steps, temperature, tp_group, blocks
        ctx.buffer = buffer
        ctx.set_materialize_grads(False)
        return at_target - peak - total.log(), total.log() - weighted / total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        """With d = logit − peak and p = exp(d) / total, the gradient by a logit is, of the log-probability, onehot − p, and of the entropy,
        −p · (d − weighted / total). Together, upstream gradients included: onehot · at_target + exp(d) · (offset + slope · d).
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
        buffer, ctx.buffer = ctx.buffer, None  # gone at a second backward, which retain_graph allows
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
    """The module that reads logits on this kind of device. Raises UserError where there is none, or it lacks a package."""
    if device.type not in _STEPS:
        raise UserError(f"log-probabilities on {device.type}: expected one of {', '.join(_STEPS)}")
    try:
        return import_module(_STEPS[device.type])
    except ModuleNotFoundError as missing:
        name = missing.name
        raise UserError(f"log-probabilities on {device.type} need {name}, which is not installed: pip install {name}") from missing


def _blocks(rows: int, tokens: int, chunk_tokens: int) -> list[slice]:
    """Blocks of rows, all of the first one's size but the last, each with at most as many logits as `chunk_tokens` tokens have."""
    size = max(1, min(rows, rows * chunk_tokens // max(tokens, 1)))
    if _ALIGNMENT < size < rows:
        size -= size % _ALIGNMENT
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _buffer(hidden: Tensor, block: slice) -> Tensor:
    """Room for the logits of the first block, the largest."""
    return hidden.new_empty(hidden.shape[0], block.stop - block.start)


def _part(buffer: Tensor, block: slice) -> Tensor:
    """The beginning of `buffer` as a matrix of [tokens, rows of `block`], contiguous."""
    tokens, rows = buffer.shape[0], block.stop - block.start
    return buffer.view(-1)[: tokens * rows].view(tokens, rows)


def _merge(one: Tensor, other: Tensor) -> Tensor:
    """Statistics [4, tokens] of two parts of the vocabulary together."""
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
    """The same statistics, their sums taken at another peak."""
    old, total, weighted, at_target = found
    shift = old - peak
    scale = shift.exp()
    return torch.stack([peak, scale * total, scale * (weighted + total * shift), at_target])


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)
