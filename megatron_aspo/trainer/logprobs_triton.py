"""The two steps of `logprobs.py` that read logits, as Triton kernels for CUDA. `logprobs_torch.py` documents what they compute.

Each reads the logits once. `statistics` keeps its sums relative to the running peak and rescales them when the peak rises; `gradient_`
works in place. The arithmetic is float32 (float64 for float64 logits), whatever the logits' dtype.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]  installed with CUDA builds of torch only
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_COLUMNS = 4096
"""Columns that one program holds at a time."""
_WARPS = 8


def statistics(logits: Tensor, temperature: float, targets: Tensor) -> Tensor:
    """Return what `logprobs_torch.statistics` does: [4, tokens] of peak, total, weighted, at_target."""
    tokens, columns = logits.shape
    found = torch.empty(4, tokens, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32, device=logits.device)
    if tokens:
        block = min(_COLUMNS, triton.next_power_of_2(columns))
        kernel: Any = _statistics  # launched by the index
        kernel[(tokens,)](logits, targets, found, tokens, columns, temperature, BLOCK=block, num_warps=_WARPS)
    return found


def gradient_(
    logits: Tensor, temperature: float, targets: Tensor, peak: Tensor, offset: Tensor, slope: Tensor | None, at_target: Tensor
) -> None:
    """Overwrite the logits with their gradient, as `logprobs_torch.gradient_` does."""
    tokens, columns = logits.shape
    if tokens:
        block = min(_COLUMNS, triton.next_power_of_2(columns))
        grid = (tokens, triton.cdiv(columns, block))
        kernel: Any = _gradient
        kernel[grid](logits, targets, peak, offset, slope, at_target, columns, temperature, BLOCK=block, num_warps=_WARPS)


@triton.jit
def _statistics(logits, targets, found, tokens, columns, temperature: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the statistics of one token. Logits are contiguous; offsets are int64, since tokens × columns may exceed 2³¹."""
    dtype: tl.constexpr = found.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    logits += token * columns
    target = tl.load(targets + token)
    peak = tl.full((), -3.0e38, dtype)  # finite, so that the first move is 0 · finite
    total = tl.zeros((), dtype)
    weighted = tl.zeros((), dtype)
    at_target = tl.zeros((), dtype)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(logits + column, mask=inside, other=0).to(dtype) / temperature
        higher = tl.maximum(peak, tl.max(tl.where(inside, x, -3.0e38), 0))
        move = peak - higher
        scale = tl.exp(move)
        d = x - higher
        exp = tl.where(inside, tl.exp(d), 0)
        weighted = scale * (weighted + total * move) + tl.sum(exp * d, 0)
        total = scale * total + tl.sum(exp, 0)
        at_target += tl.sum(tl.where(inside & (column == target), x, 0), 0)
        peak = higher
    tl.store(found + token, peak)
    tl.store(found + tokens + token, total)
    tl.store(found + 2 * tokens + token, weighted)
    tl.store(found + 3 * tokens + token, at_target)


@triton.jit
def _gradient(logits, targets, peak, offset, slope, at_target, columns, temperature: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the gradient of one token in one range of columns."""
    dtype: tl.constexpr = peak.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    logits += token * columns
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    d = tl.load(logits + column, mask=inside, other=0).to(dtype) / temperature - tl.load(peak + token)
    factor = tl.load(offset + token)
    if slope is not None:
        factor += tl.load(slope + token) * d
    grad = tl.exp(d) * factor + tl.where(column == tl.load(targets + token), tl.load(at_target + token), 0)
    tl.store(logits + column, grad.to(logits.dtype.element_ty), mask=inside)
