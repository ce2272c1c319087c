"""The contract of a policy loss: what it is given and what it returns. Pure tensors, no process group, no reduction.

    def my_loss(tokens: PolicyTokens, *, an_option: float = 1.0) -> Tensor | PolicyTerm

A loss returns one number per token. Its keyword parameters are its options in a recipe, its docstring documents them; what it needs of the
objective around it, it declares (declaration.py). Built-in losses (builtin/, listed in registry.py) and custom ones are written alike.

Tokens are the response tokens of any number of whole responses, one after another. Which of them count is decided by the reduction
(aggregation.py). A token's loss may depend on the counted tokens of its own response and on nothing else, so that it does not matter how
a mini-batch is split.

Δ = log π_θ − log π_old, r = exp(Δ) with Δ bounded to ±20, sg() stops the gradient, ρ = π_θ / sg(π_θ): value 1, gradient that of log π_θ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""Bound of log-ratios before exp, so that no weight overflows float32."""


@dataclass(frozen=True)
class PolicyTokens:
    """Inputs of a policy loss. Every tensor is [tokens]; tokens that do not count hold zeros."""

    logprobs: Tensor
    """log π_θ of the sampled token, with gradient."""
    old_logprobs: Tensor
    """log π_old: the policy at the start of the optimization phase, or the one that sampled (algorithm.old_logprobs)."""
    advantages: Tensor
    entropy: Tensor
    """Entropy of π_θ at that position, in nats, without gradient."""
    low_entropy: Tensor
    """bool: entropy at or below the configured quantile. False everywhere for a built-in loss that does not declare `entropy_classes`."""
    mask: Tensor
    """bool: which tokens count."""
    offsets: list[int]
    """Response i is tokens [offsets[i], offsets[i + 1])."""

    @property
    def log_ratio(self) -> Tensor:
        """Δ bounded to ±20, with gradient inside the bounds."""
        return (self.logprobs - self.old_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)

    def response_means(self, values: Tensor) -> Tensor:
        """Return for every token the mean of `values` over the counted tokens of its response; 0 where none counts."""
        means = []
        for start, stop in pairwise(self.offsets):
            counted = values[start:stop][self.mask[start:stop]]
            means.append((counted.sum() / max(counted.numel(), 1)).expand(stop - start))
        return torch.cat(means) if means else values


@dataclass(frozen=True)
class PolicyTerm:
    """Per-token result. Every tensor is [tokens]; all but `loss` are without gradient and only logged."""

    loss: Tensor
    weight: Tensor
    """w in the gradient −A·w·∇logp. For hard-masked tokens: the clip bound that they hit."""
    masked: Tensor
    """bool: the hard mask; these tokens have zero gradient."""
    capped: Tensor
    """bool: the weight exceeded its cap."""


PolicyLoss = Callable[[PolicyTokens], PolicyTerm]
"""A policy loss whose options are bound (find.py)."""
