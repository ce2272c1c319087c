"""Bounds, masks and surrogates that several built-in losses share."""

import torch
from torch import Tensor

from megatron_aspo.losses.policy import PolicyTerm, PolicyTokens


def choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """Return one of two numbers per token, in the dtype of `like`; torch.where alone would round Python numbers to float32."""
    return torch.where(condition, like.new_full((), yes), like.new_full((), no))


def ratio_bounds(tokens: PolicyTokens, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Return 1 − ε_low and 1 + ε_high, the same for all tokens; scalars."""
    return tokens.logprobs.new_full((), 1 - clip_low), tokens.logprobs.new_full((), 1 + clip_high)


def class_bounds(
    tokens: PolicyTokens, clip_low: float, clip_high: float, high_entropy_clip_low: float, high_entropy_clip_high: float
) -> tuple[Tensor, Tensor]:
    """Return 1 − ε_low and 1 + ε_high of each token by its entropy class, [tokens]."""
    low, like = tokens.low_entropy, tokens.logprobs
    return choose(low, 1 - clip_low, 1 - high_entropy_clip_low, like), choose(low, 1 + clip_high, 1 + high_entropy_clip_high, like)


def hard_mask(advantages: Tensor, ratio: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """Return PPO-Clip's mask, bool [tokens]: A < 0 and ratio < below, or A > 0 and ratio > above."""
    return ((advantages < 0) & (ratio < below)) | ((advantages > 0) & (ratio > above))


def weighted(tokens: PolicyTokens, weight: Tensor, masked: Tensor) -> Tensor:
    """Return −A·w·ρ, [tokens]: value −A·w, gradient −A·w∇logp, none where masked."""
    carrier = (tokens.logprobs - tokens.logprobs.detach()).exp()
    surrogate = -tokens.advantages * weight
    return torch.where(masked, surrogate, surrogate * carrier)


def clipped(tokens: PolicyTokens, below: Tensor, above: Tensor, cap: float) -> PolicyTerm:
    """Return PPO's clipped surrogate with dual clip: −min(r·A, clip(r, below, above)·A), and at most −cap·A where A < 0.

    Value and gradient are both cut: zero gradient where the clipped branch is taken and, for A < 0, where r > cap.
    """
    ratio, advantages = tokens.log_ratio.exp(), tokens.advantages
    bounded = torch.clamp(ratio, below, above)
    capped = (advantages < 0) & (ratio > cap)
    loss = torch.maximum(-advantages * ratio, -advantages * bounded)
    masked = hard_mask(advantages, ratio, below, above)
    return PolicyTerm(
        loss=torch.where(capped, -advantages * cap, loss),
        weight=torch.where(masked, bounded, torch.where(capped, cap, ratio)).detach(),
        masked=masked,
        capped=capped,
    )
