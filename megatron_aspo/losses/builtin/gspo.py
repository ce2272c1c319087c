"""GSPO in its token form (arXiv 2507.18071)."""

import torch

from megatron_aspo.losses.builtin.clipping import hard_mask, ratio_bounds, weighted
from megatron_aspo.losses.declaration import LowerClip, UpperClip, declares
from megatron_aspo.losses.policy import LOG_RATIO_BOUND, PolicyTerm, PolicyTokens


@declares(aggregation="seq_mean_token_mean")
def gspo(tokens: PolicyTokens, *, clip_low: LowerClip = 3e-4, clip_high: UpperClip = 4e-4) -> PolicyTerm:
    """[arXiv 2507.18071](https://arxiv.org/abs/2507.18071), token form.

        s = exp(mean of Δ over the response's counted tokens)
        w = s, 0 where A > 0 and s > 1 + ε_high, or A < 0 and s < 1 − ε_low

    Look at the axis. A whole response is kept or dropped, and the bounds are hundreds of times narrower, because a mean moves less than its
    tokens.

    Args:
        clip_low: Lower ε, on s.
        clip_high: Upper ε, on s.
    """
    mean = tokens.response_means((tokens.logprobs - tokens.old_logprobs).detach())
    ratio = mean.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    below, above = ratio_bounds(tokens, clip_low, clip_high)
    masked = hard_mask(tokens.advantages, ratio, below, above)
    weight = torch.where(masked, ratio.clamp(below, above), ratio)
    return PolicyTerm(weighted(tokens, weight, masked), weight, masked, capped=torch.zeros_like(masked))
