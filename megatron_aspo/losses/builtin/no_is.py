"""The ASPO paper's ablation without importance sampling (arXiv 2510.06062)."""

import torch

from megatron_aspo.losses.builtin.clipping import hard_mask, ratio_bounds, weighted
from megatron_aspo.losses.declaration import LowerClip, UpperClip
from megatron_aspo.losses.policy import PolicyTerm, PolicyTokens


def no_is(tokens: PolicyTokens, *, clip_low: LowerClip = 0.2, clip_high: UpperClip = 0.2) -> PolicyTerm:
    """The ASPO paper's ablation: no importance weight, `ppo_clip`'s mask, no dual clip.

        w = 1, 0 where A > 0 and r > 1 + ε_high, or A < 0 and r < 1 − ε_low

    Halfway between `ppo_clip` and `aspo`. If it does as well as `ppo_clip`, the weight was not what helped.

    Args:
        clip_low: Lower ε.
        clip_high: Upper ε.
    """
    masked = hard_mask(tokens.advantages, tokens.log_ratio.exp(), *ratio_bounds(tokens, clip_low, clip_high))
    weight = torch.ones_like(tokens.logprobs)
    return PolicyTerm(weighted(tokens, weight, masked), weight, masked, capped=torch.zeros_like(masked))
