"""PPO's clipped surrogate with dual clip (arXiv 1707.06347)."""

from megatron_aspo.losses.builtin.clipping import clipped, ratio_bounds
from megatron_aspo.losses.declaration import Cap, LowerClip, UpperClip
from megatron_aspo.losses.policy import PolicyTerm, PolicyTokens


def ppo_clip(tokens: PolicyTokens, *, clip_low: LowerClip = 0.2, clip_high: UpperClip = 0.2, dual_clip_neg: Cap = 3.0) -> PolicyTerm:
    """PPO ([arXiv 1707.06347](https://arxiv.org/abs/1707.06347)) with dual clip; with the advantages `grpo` it is GRPO's policy term.

        L = −min(r·A, clip(r, 1 − ε_low, 1 + ε_high)·A), and for A < 0 at most −c·A

    Value and gradient are both cut, at c too. `clip_high` above `clip_low` is DAPO's clip-higher ([arXiv
    2503.14476](https://arxiv.org/abs/2503.14476)).

    Args:
        clip_low: Lower ε.
        clip_high: Upper ε.
        dual_clip_neg: The cap c of the ratio where A < 0; beyond it a token has no gradient.
    """
    return clipped(tokens, *ratio_bounds(tokens, clip_low, clip_high), dual_clip_neg)
