"""ASPO (arXiv 2510.06062)."""

import torch

from megatron_aspo.losses.builtin.clipping import choose, class_bounds, hard_mask, weighted
from megatron_aspo.losses.declaration import Cap, LowerClip, UpperClip, declares
from megatron_aspo.losses.policy import PolicyTerm, PolicyTokens


@declares(entropy_classes=True)
def aspo(
    tokens: PolicyTokens,
    *,
    clip_low: LowerClip = 0.2,
    clip_high: UpperClip = 0.2,
    high_entropy_clip_low: LowerClip = 0.4,
    high_entropy_clip_high: UpperClip = 0.4,
    dual_clip_neg: Cap = 3.0,
    dual_clip_pos: Cap = 3.0,
) -> PolicyTerm:
    """[arXiv 2510.06062](https://arxiv.org/abs/2510.06062): the importance weight is inverted where A > 0, so that lagging tokens get the
    larger update.

        A > 0: w = min(1/r, c_pos), 0 where r > 1 + ε
        A < 0: w = min(r, c_neg), 0 where r < 1 − ε
        L = −A · stop(w) · exp(log π − stop(log π))

    The cap bounds the weight and keeps the gradient (a *soft* cap). High-entropy tokens, at which the response could have gone another way,
    may move twice as far before they are masked (dashed).

    Args:
        clip_low: Lower ε of low-entropy tokens.
        clip_high: Upper ε of low-entropy tokens.
        high_entropy_clip_low: Lower ε of high-entropy tokens.
        high_entropy_clip_high: Upper ε of high-entropy tokens.
        dual_clip_neg: The cap c_neg of the weight where A < 0.
        dual_clip_pos: The cap c_pos of the inverted weight where A > 0.
    """
    ratio = tokens.log_ratio.detach().exp()
    positive = tokens.advantages > 0
    below, above = class_bounds(tokens, clip_low, clip_high, high_entropy_clip_low, high_entropy_clip_high)
    masked = hard_mask(tokens.advantages, ratio, below, above)
    bounded = torch.where(masked, torch.where(positive, above, below), ratio)
    raw = torch.where(positive, 1 / bounded, bounded)
    cap = choose(positive, dual_clip_pos, dual_clip_neg, ratio)
    weight = torch.minimum(raw, cap)
    return PolicyTerm(weighted(tokens, weight, masked), weight, masked, capped=raw > cap)
