"""Archer's dual-token constraints (arXiv 2507.15778)."""

from megatron_aspo.losses.builtin.clipping import class_bounds, clipped
from megatron_aspo.losses.declaration import Cap, LowerClip, UpperClip, declares
from megatron_aspo.losses.policy import PolicyTerm, PolicyTokens


@declares(entropy_classes=True, kl_by_entropy_class=True)
def archer(
    tokens: PolicyTokens,
    *,
    clip_low: LowerClip = 0.2,
    clip_high: UpperClip = 0.2,
    high_entropy_clip_low: LowerClip = 0.4,
    high_entropy_clip_high: UpperClip = 0.4,
    dual_clip_neg: Cap = 3.0,
) -> PolicyTerm:
    """[arXiv 2507.15778](https://arxiv.org/abs/2507.15778): `ppo_clip` with ε, and the weight β of the KL term, by entropy class.

    It has ASPO's classes with PPO's weight, so comparing the two isolates the inversion. β is `kl_coef` for low-entropy tokens and
    `high_entropy_kl_coef` for high-entropy tokens.

    Args:
        clip_low: Lower ε of low-entropy tokens.
        clip_high: Upper ε of low-entropy tokens.
        high_entropy_clip_low: Lower ε of high-entropy tokens.
        high_entropy_clip_high: Upper ε of high-entropy tokens.
        dual_clip_neg: The cap c of the ratio where A < 0; beyond it a token has no gradient.
    """
    bounds = class_bounds(tokens, clip_low, clip_high, high_entropy_clip_low, high_entropy_clip_high)
    return clipped(tokens, *bounds, dual_clip_neg)
