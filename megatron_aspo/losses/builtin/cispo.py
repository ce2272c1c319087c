"""CISPO (arXiv 2506.13585)."""

import torch

from megatron_aspo.losses.builtin.clipping import ratio_bounds
from megatron_aspo.losses.declaration import LowerClip, UpperClip
from megatron_aspo.losses.policy import PolicyTerm, PolicyTokens


def cispo(tokens: PolicyTokens, *, clip_low: LowerClip = 1.0, clip_high: UpperClip = 0.2) -> PolicyTerm:
    """[arXiv 2506.13585](https://arxiv.org/abs/2506.13585).

        L = −A · stop(clip(r, 1 − ε_low, 1 + ε_high)) · log π

    No token ever loses its gradient; only the weight is bounded.

    Args:
        clip_low: Lower ε; 1 means no lower bound.
        clip_high: Upper ε.
    """
    ratio = tokens.log_ratio.detach().exp()
    weight = ratio.clamp(*ratio_bounds(tokens, clip_low, clip_high))
    return PolicyTerm(
        loss=-tokens.advantages * weight * tokens.logprobs,
        weight=weight,
        masked=torch.zeros_like(ratio, dtype=torch.bool),
        capped=weight != ratio,
    )
