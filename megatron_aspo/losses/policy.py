"""Policy losses: one function per loss, from per-token inputs to per-token losses. Pure tensors, no process group, no reduction.

Every function takes `PolicyTokens` and the options and returns a `PolicyTerm`. Tokens are the response tokens of any number of
responses, one after another; whether a token counts is decided by the reduction, not here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_aspo.losses.options import AlgorithmOptions

LOG_RATIO_BOUND = 20.0
"""Bound of log-ratios before exp, so that no weight overflows float32."""


@dataclass(frozen=True)
class PolicyTokens:
    """What a policy loss may look at. Every tensor is [tokens]."""

    logprobs: Tensor
    """log π_θ of the sampled token, with gradient."""
    old_logprobs: Tensor
    """log π_old: the policy at the start of the optimization phase."""
    advantages: Tensor
    low_entropy: Tensor
    """bool: entropy of π_θ at or under the configured quantile of its own response."""


@dataclass(frozen=True)
class PolicyTerm:
    """Per-token result. Every tensor is [tokens]; all but `loss` are without gradient."""

    loss: Tensor
    weight: Tensor
    """What the loss multiplies the plain policy gradient by where it cuts nothing; for cut tokens, what the cut was decided by."""
    masked: Tensor
    """bool: the hard mask; these tokens have zero gradient."""
    capped: Tensor
    """bool: the dual clip was reached."""


PolicyLoss = Callable[[PolicyTokens, AlgorithmOptions], PolicyTerm]


def _log_ratio(tokens: PolicyTokens) -> Tensor:
    return (tokens.logprobs - tokens.old_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """Of two numbers per token, in the dtype of `like`: torch.where alone would round Python numbers to float32."""
    return torch.where(condition, like.new_tensor(yes), like.new_tensor(no))


def aspo(tokens: PolicyTokens, options: AlgorithmOptions) -> PolicyTerm:
    """ASPO (arXiv 2510.06062): the importance weight is inverted where A > 0, so that lagging tokens get the larger update.

    r = π_θ / π_old. Gradient −A·w with w = min(r, c_neg) where A < 0 and min(1/r, c_pos) where A > 0; the cap changes the value of w and
    keeps the gradient. Zero where A < 0 and r < 1 − ε, or A > 0 and r > 1 + ε; there w stands at the clip bound. ε depends on the token's
    entropy class.
    """
    ratio = _log_ratio(tokens).detach().exp()
    positive = tokens.advantages > 0
    negative = tokens.advantages < 0
    below = _choose(tokens.low_entropy, 1 - options.clip_low, 1 - options.high_entropy_clip_low, ratio)
    above = _choose(tokens.low_entropy, 1 + options.clip_high, 1 + options.high_entropy_clip_high, ratio)
    masked = (negative & (ratio < below)) | (positive & (ratio > above))
    bounded = torch.where(masked, torch.where(positive, above, below), ratio)
    raw = torch.where(positive, 1 / bounded, bounded)
    cap = _choose(positive, options.dual_clip_pos, options.dual_clip_neg, ratio)
    weight = torch.minimum(raw, cap)
    # The value is 1, the gradient that of logprobs.
    carrier = (tokens.logprobs - tokens.logprobs.detach()).exp()
    surrogate = -tokens.advantages * weight
    return PolicyTerm(
        loss=torch.where(masked, surrogate, surrogate * carrier),
        weight=weight,
        masked=masked,
        capped=raw > cap,
    )


def ppo_clip(tokens: PolicyTokens, options: AlgorithmOptions) -> PolicyTerm:
    """PPO's clipped surrogate with dual clip: −min(r·A, clip(r, 1 − ε_low, 1 + ε_high)·A), and at most −c·A where A < 0.

    Value and gradient are both cut: zero gradient where the clipped branch is taken and, for A < 0, where r > c.
    """
    ratio = _log_ratio(tokens).exp()
    advantages = tokens.advantages
    clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    negative = advantages < 0
    capped = negative & (ratio > options.dual_clip_neg)
    loss = torch.where(capped, -advantages * options.dual_clip_neg, loss)
    masked = (negative & (ratio < 1 - options.clip_low)) | ((advantages > 0) & (ratio > 1 + options.clip_high))
    return PolicyTerm(loss=loss, weight=ratio.detach(), masked=masked, capped=capped)


POLICY_LOSSES: dict[str, PolicyLoss] = {"aspo": aspo, "ppo_clip": ppo_clip}
