"""The two steps of `logprobs.py` that read logits, in plain PyTorch for the CPU.

They process a few rows at a time, so that the working copy stays in the processor's cache: logits are read from memory once, and little
memory is needed beside them. The sums are float32 (float64 for float64 logits), whatever the logits' dtype.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_WORKING_SET = 1 << 18
"""Logits in one working copy."""


def statistics(logits: Tensor, temperature: float, targets: Tensor) -> Tensor:
    """Return the softmax statistics of a block of the vocabulary, [4, tokens]: peak, total, weighted, at_target.

    logits: [tokens, columns], before the temperature, not changed; targets: int64 [tokens], the column of each target, or any number
    outside the block. With x = logits / temperature and d = x − peak: peak is the largest x, total the sum of exp(d), weighted the sum of
    exp(d) · d, at_target x at the target, or 0. float32 (float64 for float64 logits).
    """
    found = torch.empty(4, logits.shape[0], dtype=_accumulator(logits))
    for part in _parts(logits):
        peak = logits[part].amax(-1).to(found.dtype) / temperature
        columns, inside = _columns(targets[part], logits)
        at_target = logits[part].gather(1, columns[:, None])[:, 0].to(found.dtype).div_(temperature).masked_fill_(~inside, 0)
        d = _below(peak, logits[part], temperature)
        exp = d.exp()
        found[:, part] = torch.stack([peak, exp.sum(-1), exp.mul_(d).sum(-1), at_target])
    return found


def gradient_(
    logits: Tensor, temperature: float, targets: Tensor, peak: Tensor, offset: Tensor, slope: Tensor | None, at_target: Tensor
) -> None:
    """Overwrite the logits with exp(d) · (offset + slope · d), plus `at_target` in the target's column.

    logits, targets: as in `statistics`, d with this peak; peak, offset, slope, at_target: [tokens], float32 (float64 for float64 logits).
    A slope of None is 0.
    """
    for part in _parts(logits):
        d = _below(peak[part], logits[part], temperature)
        factor = offset[part, None] if slope is None else torch.addcmul(offset[part, None], d, slope[part, None])
        grad = d.exp_().mul_(factor)
        columns, inside = _columns(targets[part], logits)
        grad.scatter_add_(1, columns[:, None], (at_target[part] * inside)[:, None])
        logits[part] = grad


def _below(peak: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Return logits / temperature − peak, in peak's dtype, in one pass over memory."""
    return torch.add(-peak[:, None], logits, alpha=1 / temperature)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _parts(logits: Tensor) -> Iterator[slice]:
    tokens, columns = logits.shape
    size = max(_WORKING_SET // columns, 1)
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def _columns(targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return each target's column in this block of the rank's rows, 0 where it is outside, and a mask of those inside.

    targets: int64 [tokens], relative to the block's first row. logits: [tokens, rows of the block].
    """
    inside = (targets >= 0) & (targets < logits.shape[1])
    return targets.masked_fill(~inside, 0), inside
