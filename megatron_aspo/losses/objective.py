"""The objective of one micro-batch: policy loss, KL and entropy terms, one normalisation, and the figures that are logged."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.policy import POLICY_LOSSES, PolicyTerm, PolicyTokens
from megatron_aspo.losses.tally import Tally
from megatron_aspo.losses.terms import k3, low_entropy_tokens


@dataclass(frozen=True)
class ObjectiveTokens:
    """The response tokens of a micro-batch. Every tensor is [tokens]."""

    logprobs: Tensor
    """With gradient."""
    entropy: Tensor
    """With gradient."""
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    mask: Tensor
    """bool: which tokens count."""
    offsets: list[int]
    """Response i is tokens [offsets[i], offsets[i + 1])."""
    names: tuple[str, ...]
    """[responses]: how an error names the sample."""


def objective(tokens: ObjectiveTokens, options: AlgorithmOptions, counted_tokens: int) -> tuple[Tensor, Tally]:
    """This micro-batch's share of the mini-batch loss, and its tally.

    Normalisation (token mean): `counted_tokens` is the number of counted tokens of the whole mini-batch, over all micro-batches and ranks,
    known before the first micro-batch runs. Each micro-batch contributes Σ L_t / counted_tokens; contributions are summed and never
    averaged, so the gradient does not depend on how the mini-batch is cut. Raises FloatingPointError for a non-finite counted input.
    """
    _check_finite(tokens)
    if not tokens.mask.any():
        # The sum over no token, kept in the graph so that every rank has a backward pass to run.
        return tokens.logprobs.sum() * 0.0, {}
    low_entropy = low_entropy_tokens(tokens.entropy, tokens.mask, tokens.offsets, options.low_entropy_quantile)
    policy_tokens = PolicyTokens(tokens.logprobs, tokens.old_logprobs, tokens.advantages, low_entropy)
    term = POLICY_LOSSES[options.policy_loss](policy_tokens, options)
    per_token = term.loss
    kl = None
    if tokens.ref_logprobs is not None:
        kl = k3(tokens.logprobs, tokens.ref_logprobs)
        per_token = per_token + options.kl_coef * kl
    if options.entropy_coef:
        per_token = per_token - options.entropy_coef * tokens.entropy
    loss = _counted_sum(per_token, tokens.mask) / counted_tokens
    return loss, _tally(tokens, term, per_token, kl)


def _counted_sum(values: Tensor, mask: Tensor) -> Tensor:
    # where, not a product: an uncounted token may hold anything, infinities included.
    return torch.where(mask, values, 0.0).sum()


def _check_finite(tokens: ObjectiveTokens) -> None:
    inputs = {
        "logprob": tokens.logprobs,
        "entropy": tokens.entropy,
        "old logprob": tokens.old_logprobs,
        "advantage": tokens.advantages,
        "reference logprob": tokens.ref_logprobs,
    }
    for what, values in inputs.items():
        if values is None:
            continue
        bad = tokens.mask & ~torch.isfinite(values.detach())
        if bad.any():
            at = int(bad.nonzero()[0])
            response = next(i for i, stop in enumerate(tokens.offsets[1:]) if at < stop)
            raise FloatingPointError(
                f"sample {tokens.names[response]}: {what} of response token {at - tokens.offsets[response]} is {float(values[at].detach())}"
            )


@torch.no_grad()
def _tally(tokens: ObjectiveTokens, term: PolicyTerm, per_token: Tensor, kl: Tensor | None) -> Tally:
    mask = tokens.mask
    figures: dict[str, tuple[Tensor, Tensor]] = {
        "loss": (per_token, mask),
        "policy_loss": (term.loss, mask),
        "entropy": (tokens.entropy, mask),
        "weight_distance": ((term.weight - 1).abs(), mask & (tokens.advantages != 0)),
    }
    if kl is not None:
        figures["kl"] = (kl, mask)
    for sign, chosen in (("positive", tokens.advantages > 0), ("negative", tokens.advantages < 0)):
        chosen = chosen & mask
        figures[f"hard_mask_share/{sign}"] = (term.masked.float(), chosen)
        figures[f"soft_cap_share/{sign}"] = (term.capped.float(), chosen)
        figures[f"weight/{sign}"] = (term.weight, chosen)
        figures[f"weight_distance/{sign}"] = ((term.weight - 1).abs(), chosen)
    # One transfer to the host for all figures.
    sums = torch.stack([torch.stack([_counted_sum(values, chosen).double(), chosen.sum().double()]) for values, chosen in figures.values()])
    return {name: (total, count) for name, (total, count) in zip(figures, sums.tolist(), strict=True)}
