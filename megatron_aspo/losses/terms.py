"""Per-token terms beside the policy loss: KL to the reference, entropy classes, correction of the engine–trainer mismatch."""

from itertools import pairwise
from math import inf

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_aspo.losses.policy import LOG_RATIO_BOUND


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, value_clamp: float = 0.0) -> Tensor:
    """Return an estimate of KL(π_θ ‖ π_ref) per token, [tokens], from x = ref_logprobs − logprobs bounded to ±20.

    k1 = −x, k2 = x² / 2, k3 = e^x − x − 1 (Schulman, "Approximating KL divergence", 2020). A `value_clamp` above 0 bounds the value to ±
    itself; beyond it there is no gradient.
    """
    x = (ref_logprobs - logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    value = {"k1": lambda: -x, "k2": lambda: x * x / 2, "k3": lambda: torch.expm1(x) - x}[estimator]()
    return value.clamp(-value_clamp, value_clamp) if value_clamp else value


def quantile(values: Tensor, q: float) -> float:
    """Return the q-quantile by linear interpolation, in float64; −inf of no value. Unlike torch.quantile it takes any number of values."""
    if not values.numel():
        return -inf
    ordered = values.detach().double().sort().values
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return float(torch.lerp(ordered[below], ordered[above], position - below))


def low_entropy_tokens(entropy: Tensor, mask: Tensor, offsets: list[int], q: float, threshold: float | None = None) -> Tensor:
    """Return bool [tokens]: entropy at or under `threshold`, else under the q-quantile of the counted tokens of the same response.

    entropy: [tokens]; mask: bool [tokens]; offsets: response i is tokens [offsets[i], offsets[i + 1]).
    """
    if threshold is not None:
        return entropy.double() <= threshold
    if not len(entropy):
        return torch.zeros_like(mask)
    lengths = [stop - start for start, stop in pairwise(offsets)]
    thresholds = _quantiles(list(torch.where(mask, entropy.detach().double(), inf).split(lengths)), list(mask.split(lengths)), q)
    return entropy.double() <= torch.cat([of.expand(length) for of, length in zip(thresholds, lengths, strict=True)])


def _quantiles(values: list[Tensor], masks: list[Tensor], q: float) -> Tensor:
    """Return `quantile` of the counted values of each response, [responses], without making the host wait for a device.

    values: float64, infinite where none counts.
    """
    ordered = pad_sequence(values, batch_first=True, padding_value=inf).sort(1).values
    last = pad_sequence(masks, batch_first=True).sum(1, keepdim=True) - 1
    position = q * last.clamp(min=0).double()
    below = position.long()
    above = torch.minimum(below + 1, last.clamp(min=0))
    found = torch.lerp(ordered.gather(1, below), ordered.gather(1, above), position - below)
    return torch.where(last < 0, -inf, found)[:, 0]


def rollout_correction(old_logprobs: Tensor, rollout_logprobs: Tensor, name: str, cap: float) -> tuple[Tensor, Tensor]:
    """Return the weight of the policy term, and where it is not u (`tis`) or 1 (bool), both [tokens]; u = exp(old − rollout).

    `tis`: min(u, cap), truncated importance sampling. `mask`: 1 inside [1/cap, cap], else 0. `none`: 1.
    """
    ratio = (old_logprobs - rollout_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    if name == "tis":
        return ratio.clamp(max=cap), ratio > cap
    outside = (ratio < 1 / cap) | (ratio > cap) if name == "mask" else torch.zeros_like(ratio, dtype=torch.bool)
    return torch.where(outside, torch.zeros_like(ratio), torch.ones_like(ratio)), outside
