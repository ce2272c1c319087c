"""What stands beside the policy loss: KL to the reference and entropy classes."""

import torch
from torch import Tensor

from megatron_aspo.losses.policy import LOG_RATIO_BOUND


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 estimate of KL(π_θ ‖ π_ref) per token: e^x − x − 1 with x = ref_logprobs − logprobs clamped to ±20. ≥ 0, [tokens]."""
    x = (ref_logprobs - logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return torch.expm1(x) - x


def low_entropy_tokens(entropy: Tensor, mask: Tensor, offsets: list[int], quantile: float) -> Tensor:
    """bool [tokens]: entropy at or under the `quantile` (linear interpolation) of the counted tokens of the same response.

    entropy: [tokens]; mask: bool [tokens]; offsets: response i is tokens[offsets[i]:offsets[i + 1]].
    """
    entropy = entropy.detach()
    threshold = torch.empty_like(entropy)
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        counted = entropy[start:stop][mask[start:stop]]
        threshold[start:stop] = torch.quantile(counted, quantile) if counted.numel() else 0.0
    return entropy <= threshold
