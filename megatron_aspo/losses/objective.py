"""The objective of one micro-batch: policy loss, KL and entropy terms, one normalisation, and the figures that are logged."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.import_path import one_line
from megatron_aspo.losses.aggregation import Totals, token_weights
from megatron_aspo.losses.check import reads_entropy_classes
from megatron_aspo.losses.custom import find_policy_loss
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.policy import LOG_RATIO_BOUND, PolicyTerm, PolicyTokens
from megatron_aspo.losses.tally import Tally
from megatron_aspo.losses.terms import kl_estimate, low_entropy_tokens, rollout_correction


@dataclass(frozen=True)
class ObjectiveTokens:
    """The response tokens of a micro-batch: whole responses, one after another. Every tensor is [tokens]."""

    logprobs: Tensor
    """With gradient."""
    entropy: Tensor
    """With gradient."""
    old_logprobs: Tensor
    rollout_logprobs: Tensor
    """What the engine reported while sampling."""
    ref_logprobs: Tensor | None
    advantages: Tensor
    mask: Tensor
    """bool: which tokens count. The others may hold anything, infinities included."""
    offsets: list[int]
    """Response i is tokens [offsets[i], offsets[i + 1])."""
    names: tuple[str, ...]
    """[responses]: how an error names the sample."""


def objective(tokens: ObjectiveTokens, options: AlgorithmOptions, totals: Totals) -> tuple[Tensor, Tally]:
    """This micro-batch's share of the mini-batch loss (a scalar; shares add up to the loss, see `token_weights`), and its tally.

    L_t = policy term × rollout correction + β·KL estimate − entropy_coef·H. Raises FloatingPointError for a non-finite counted input.
    """
    _check_finite(tokens, _inputs(tokens))
    tokens = _without_uncounted(tokens)
    entropy = tokens.entropy.detach()
    low_entropy = torch.zeros_like(tokens.mask)
    if reads_entropy_classes(options):
        low_entropy = low_entropy_tokens(entropy, tokens.mask, tokens.offsets, options.low_entropy_quantile, totals.entropy_threshold)
    policy_tokens = PolicyTokens(
        tokens.logprobs, tokens.old_logprobs, tokens.advantages, entropy, low_entropy, tokens.mask, tokens.offsets, options
    )
    term = _policy_term(policy_tokens, tokens)
    correction, corrected = rollout_correction(
        tokens.old_logprobs, tokens.rollout_logprobs, options.rollout_correction, options.rollout_correction_cap
    )
    per_token = term.loss * correction - options.entropy_coef * tokens.entropy
    figures = {
        "entropy": (entropy, tokens.mask),
        "rollout_correction/weight": (correction, tokens.mask),
        "rollout_correction/share": (corrected, tokens.mask),
    }
    if tokens.ref_logprobs is not None:
        kl = kl_estimate(tokens.logprobs, tokens.ref_logprobs, options.kl_estimator, options.kl_value_clamp)
        figures["kl"] = (kl, tokens.mask)
        if options.kl_in == "loss":
            per_token = per_token + _kl_weight(low_entropy, kl, options) * kl
    per_token = torch.where(tokens.mask, per_token, 0.0)
    weights = token_weights(tokens.mask, tokens.offsets, options, totals)
    loss = (weights * per_token).sum()
    shares = {"loss": loss, "policy_loss": (weights * term.loss * correction).sum()}
    return loss, _tally(figures | _policy_figures(tokens, term), shares, float(tokens.mask.sum()) / max(totals.tokens, 1))


def _policy_term(policy_tokens: PolicyTokens, tokens: ObjectiveTokens) -> PolicyTerm:
    """Raises UserError for whatever is wrong with a loss of the user's own."""
    options = policy_tokens.options
    if ":" not in options.policy_loss:
        return find_policy_loss(options)(policy_tokens)
    try:
        term = find_policy_loss(options)(policy_tokens)
        if policy_tokens.logprobs.requires_grad and not term.loss.requires_grad and policy_tokens.advantages.any():
            raise ValueError("the loss carries no gradient")
        _check_finite(tokens, {"loss": term.loss})
    except BaseException as error:  # the user's own code may raise anything, SystemExit too
        raise UserError(
            f"algorithm.policy_loss={options.policy_loss}: {one_line(error)}; correct it, and try it with megatron-aspo check-loss"
        ) from error
    return term


def _kl_weight(low_entropy: Tensor, like: Tensor, options: AlgorithmOptions) -> Tensor:
    """β of each token: by entropy class under `archer`, else the same for all."""
    other = options.high_entropy_kl_coef if options.policy_loss == "archer" else options.kl_coef
    return torch.where(low_entropy, like.new_full((), options.kl_coef), like.new_full((), other))


def _without_uncounted(tokens: ObjectiveTokens) -> ObjectiveTokens:
    """Zeros where no token counts: whatever stands there must reach neither loss nor gradient (0 × inf is NaN)."""
    values = {f.name: getattr(tokens, f.name) for f in fields(tokens)}
    floats = {name: v for name, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return ObjectiveTokens(**values | {name: torch.where(tokens.mask, v, 0.0) for name, v in floats.items()})


def _inputs(tokens: ObjectiveTokens) -> dict[str, Tensor]:
    """By the names that error messages use."""
    inputs = {
        "logprob": tokens.logprobs,
        "entropy": tokens.entropy,
        "old logprob": tokens.old_logprobs,
        "rollout logprob": tokens.rollout_logprobs,
        "reference logprob": tokens.ref_logprobs,
        "advantage": tokens.advantages,
    }
    return {what: values for what, values in inputs.items() if values is not None}


def _check_finite(tokens: ObjectiveTokens, given: dict[str, Tensor]) -> None:
    bad = tokens.mask & ~torch.isfinite(torch.stack(list(given.values())))
    if bad.any():
        row, at = bad.nonzero()[0].tolist()
        what, values = list(given.items())[row]
        response = next(i for i, stop in enumerate(tokens.offsets[1:]) if at < stop)
        raise FloatingPointError(
            f"sample {tokens.names[response]}: {what} of response token {at - tokens.offsets[response]} is {float(values[at].detach())}"
        )


Figures = dict[str, tuple[Tensor, Tensor]]
"""Name → (values, which of them count), both [tokens]."""


@torch.no_grad()
def _policy_figures(tokens: ObjectiveTokens, term: PolicyTerm) -> Figures:
    """The policy loss's figures, by sign of the advantage; tokens with A = 0 have no sign and no gradient."""
    distance = (term.weight - 1).abs()
    ratio = (tokens.logprobs - tokens.old_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    figures = {"weight_distance": (distance, tokens.mask & (tokens.advantages != 0))}
    for sign, chosen in (("positive", tokens.advantages > 0), ("negative", tokens.advantages < 0)):
        chosen = chosen & tokens.mask
        figures[f"hard_mask_share/{sign}"] = (term.masked, chosen)
        figures[f"soft_cap_share/{sign}"] = (term.capped, chosen)
        figures[f"weight/{sign}"] = (term.weight, chosen)
        figures[f"weight_distance/{sign}"] = (distance, chosen)
        figures[f"ratio/{sign}"] = (ratio, chosen)
    return figures


@torch.no_grad()
def _tally(figures: Figures, shares: dict[str, Tensor], part: float) -> Tally:
    """Sums and counts. Of the shares, which add up to the mini-batch's, the count is the part of the mini-batch that this is."""
    sums = [torch.stack([torch.where(chosen, values.double(), 0.0).sum(), chosen.sum().double()]) for values, chosen in figures.values()]
    # One transfer to the host for all figures.
    totals = torch.stack([*sums, *(torch.stack([share.double(), share.new_full((), part).double()]) for share in shares.values())])
    return {name: (total, count) for name, (total, count) in zip([*figures, *shares], totals.tolist(), strict=True)}
