"""Policy losses: one function per loss, from per-token inputs to per-token losses. Pure tensors, no process group, no reduction.

Every function takes one `PolicyTokens` and returns a `PolicyTerm`. Tokens are the response tokens of any number of whole responses, one
after another. Which of them count is decided by the reduction (aggregation.py); what a token's loss is may depend on the counted tokens of
its own response and on nothing else, so that it does not matter how a mini-batch is cut.

Δ = log π_θ − log π_old, r = exp(Δ) with Δ bounded to ±20, sg() stops the gradient, ρ = π_θ / sg(π_θ): value 1, gradient that of log π_θ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_aspo.losses.options import AlgorithmOptions

LOG_RATIO_BOUND = 20.0
"""Bound of log-ratios before exp, so that no weight overflows float32."""


@dataclass(frozen=True)
class PolicyTokens:
    """What a policy loss may look at. Every tensor is [tokens]; tokens that do not count hold zeros."""

    logprobs: Tensor
    """log π_θ of the sampled token, with gradient."""
    old_logprobs: Tensor
    """log π_old: the policy at the start of the optimization phase, or the one that sampled (algorithm.old_logprobs)."""
    advantages: Tensor
    entropy: Tensor
    """Of π_θ at that position, in nats, without gradient."""
    low_entropy: Tensor
    """bool: entropy at or under the configured quantile."""
    mask: Tensor
    """bool: which tokens count."""
    offsets: list[int]
    """Response i is tokens [offsets[i], offsets[i + 1])."""
    options: AlgorithmOptions

    @property
    def log_ratio(self) -> Tensor:
        """Δ bounded to ±20, with gradient inside the bounds."""
        return (self.logprobs - self.old_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)

    def response_means(self, values: Tensor) -> Tensor:
        """For every token the mean of `values` over the counted tokens of its response; 0 where none counts."""
        means = []
        for start, stop in pairwise(self.offsets):
            counted = values[start:stop][self.mask[start:stop]]
            means.append((counted.sum() / max(counted.numel(), 1)).expand(stop - start))
        return torch.cat(means) if means else values


@dataclass(frozen=True)
class PolicyTerm:
    """Per-token result. Every tensor is [tokens]; all but `loss` are without gradient."""

    loss: Tensor
    weight: Tensor
    """What multiplies the plain policy gradient −A∇logp; where the gradient is cut, the bound at which it was."""
    masked: Tensor
    """bool: the hard mask; these tokens have zero gradient."""
    capped: Tensor
    """bool: the weight's cap was passed."""


PolicyLoss = Callable[[PolicyTokens], PolicyTerm]


def _choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """Of two numbers per token, in the dtype of `like`: torch.where alone would round Python numbers to float32."""
    return torch.where(condition, like.new_full((), yes), like.new_full((), no))


def _class_bounds(tokens: PolicyTokens) -> tuple[Tensor, Tensor]:
    """1 − ε and 1 + ε of each token by its entropy class."""
    options, low, like = tokens.options, tokens.low_entropy, tokens.logprobs
    below = _choose(low, 1 - options.clip_low, 1 - options.high_entropy_clip_low, like)
    return below, _choose(low, 1 + options.clip_high, 1 + options.high_entropy_clip_high, like)


def _bounds(tokens: PolicyTokens) -> tuple[Tensor, Tensor]:
    """1 − ε_low and 1 + ε_high, the same for all tokens; scalars."""
    return tokens.logprobs.new_full((), 1 - tokens.options.clip_low), tokens.logprobs.new_full((), 1 + tokens.options.clip_high)


def _hard_mask(advantages: Tensor, ratio: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """PPO-Clip's: A < 0 and ratio < below, or A > 0 and ratio > above."""
    return ((advantages < 0) & (ratio < below)) | ((advantages > 0) & (ratio > above))


def _weighted(tokens: PolicyTokens, weight: Tensor, masked: Tensor) -> Tensor:
    """−A·w·ρ: value −A·w, gradient −A·w∇logp, none where masked."""
    carrier = (tokens.logprobs - tokens.logprobs.detach()).exp()
    surrogate = -tokens.advantages * weight
    return torch.where(masked, surrogate, surrogate * carrier)


def aspo(tokens: PolicyTokens) -> PolicyTerm:
    """ASPO (arXiv 2510.06062): the importance weight is inverted where A > 0, so that lagging tokens get the larger update.

    Gradient −A·w∇logp with w = min(r, c_neg) where A < 0 and min(1/r, c_pos) where A > 0; the cap changes the value of w and keeps the
    gradient. Zero where A < 0 and r < 1 − ε, or A > 0 and r > 1 + ε; there w stands at the clip bound. ε depends on the entropy class.
    """
    ratio = tokens.log_ratio.detach().exp()
    positive = tokens.advantages > 0
    below, above = _class_bounds(tokens)
    masked = _hard_mask(tokens.advantages, ratio, below, above)
    bounded = torch.where(masked, torch.where(positive, above, below), ratio)
    raw = torch.where(positive, 1 / bounded, bounded)
    cap = _choose(positive, tokens.options.dual_clip_pos, tokens.options.dual_clip_neg, ratio)
    weight = torch.minimum(raw, cap)
    return PolicyTerm(_weighted(tokens, weight, masked), weight, masked, capped=raw > cap)


def ppo_clip(tokens: PolicyTokens) -> PolicyTerm:
    """PPO's clipped surrogate with dual clip: −min(r·A, clip(r, 1 − ε_low, 1 + ε_high)·A), and at most −c·A where A < 0.

    Value and gradient are both cut: zero gradient where the clipped branch is taken and, for A < 0, where r > c. With ε_high > ε_low this
    is DAPO's clip-higher (arXiv 2503.14476).
    """
    return _clipped(tokens, *_bounds(tokens))


def archer(tokens: PolicyTokens) -> PolicyTerm:
    """Archer (arXiv 2507.15778): `ppo_clip` with ε by entropy class. Its KL weight by class is in objective.py."""
    return _clipped(tokens, *_class_bounds(tokens))


def _clipped(tokens: PolicyTokens, below: Tensor, above: Tensor) -> PolicyTerm:
    ratio = tokens.log_ratio.exp()
    advantages, cap = tokens.advantages, tokens.options.dual_clip_neg
    clipped = torch.clamp(ratio, below, above)
    capped = (advantages < 0) & (ratio > cap)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    masked = _hard_mask(advantages, ratio, below, above)
    return PolicyTerm(
        loss=torch.where(capped, -advantages * cap, loss),
        weight=torch.where(masked, clipped, torch.where(capped, cap, ratio)).detach(),
        masked=masked,
        capped=capped,
    )


def gspo(tokens: PolicyTokens) -> PolicyTerm:
    """GSPO (arXiv 2507.18071), token form: weight s = exp(mean Δ of the response), clipped on s as in `ppo_clip`, without dual clip."""
    mean = tokens.response_means((tokens.logprobs - tokens.old_logprobs).detach())
    ratio = mean.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    below, above = _bounds(tokens)
    masked = _hard_mask(tokens.advantages, ratio, below, above)
    weight = torch.where(masked, ratio.clamp(below, above), ratio)
    return PolicyTerm(_weighted(tokens, weight, masked), weight, masked, capped=torch.zeros_like(masked))


def cispo(tokens: PolicyTokens) -> PolicyTerm:
    """CISPO (arXiv 2506.13585): −A·sg(w)·logp with w = r bounded to [1 − ε_low, 1 + ε_high]; every token keeps a gradient."""
    ratio = tokens.log_ratio.detach().exp()
    weight = ratio.clamp(*_bounds(tokens))
    return PolicyTerm(
        loss=-tokens.advantages * weight * tokens.logprobs,
        weight=weight,
        masked=torch.zeros_like(ratio, dtype=torch.bool),
        capped=weight != ratio,
    )


def reinforce(tokens: PolicyTokens) -> PolicyTerm:
    """−A·logp: no weight, no bound."""
    none = torch.zeros_like(tokens.logprobs, dtype=torch.bool)
    return PolicyTerm(-tokens.advantages * tokens.logprobs, torch.ones_like(tokens.logprobs), none, none)


def no_is(tokens: PolicyTokens) -> PolicyTerm:
    """The ASPO paper's ablation: −A·ρ under `ppo_clip`'s hard mask, without importance weight and dual clip."""
    masked = _hard_mask(tokens.advantages, tokens.log_ratio.exp(), *_bounds(tokens))
    weight = torch.ones_like(tokens.logprobs)
    return PolicyTerm(_weighted(tokens, weight, masked), weight, masked, capped=torch.zeros_like(masked))


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "aspo": aspo,
    "ppo_clip": ppo_clip,
    "archer": archer,
    "gspo": gspo,
    "cispo": cispo,
    "reinforce": reinforce,
    "no_is": no_is,
}
