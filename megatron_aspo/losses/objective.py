"""The objective of one micro-batch: policy loss, KL and entropy terms, one normalisation, and the metrics that are logged."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.import_path import one_line
from megatron_aspo.losses.aggregation import Totals, token_weights
from megatron_aspo.losses.find import find_policy_loss
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.policy import LOG_RATIO_BOUND, PolicyTerm, PolicyTokens
from megatron_aspo.losses.registry import declaration, is_custom
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
    """Reported by the engine while sampling."""
    ref_logprobs: Tensor | None
    advantages: Tensor
    mask: Tensor
    """bool: which tokens count. The others may hold anything, infinities included."""
    offsets: list[int]
    """Response i is tokens [offsets[i], offsets[i + 1])."""
    names: tuple[str, ...]
    """[responses]: name of the sample in errors."""


class Objective:
    """The loss of micro-batches under one set of options. The policy loss is found and bound once."""

    def __init__(self, options: AlgorithmOptions):
        """Raises UserError if the policy loss cannot be loaded or does not take its options."""
        self.options = options
        self._policy_loss = find_policy_loss(options)
        self._declared = declaration(options.policy_loss)

    @property
    def needs_entropy_threshold(self) -> bool:
        """Whether `Totals.entropy_threshold` must be given: the entropy classes are those of the whole mini-batch."""
        return self.options.entropy_quantile_scope == "mini_batch" and self._declared.entropy_classes

    def __call__(self, tokens: ObjectiveTokens, totals: Totals) -> tuple[Tensor, Tally]:
        """Return this micro-batch's share of the mini-batch loss (a scalar; shares add up, see `token_weights`), and its tally.

        L_t = policy term × rollout correction + β·KL estimate − entropy_coef·H. Raises FloatingPointError for a non-finite counted input.
        """
        options = self.options
        _check_finite(tokens, _inputs(tokens))
        tokens = _without_uncounted(tokens)
        entropy = tokens.entropy.detach()
        low_entropy = torch.zeros_like(tokens.mask)
        if self._declared.entropy_classes:
            low_entropy = low_entropy_tokens(entropy, tokens.mask, tokens.offsets, options.low_entropy_quantile, totals.entropy_threshold)
        term = self._policy_term(tokens, low_entropy)
        correction, corrected = rollout_correction(
            tokens.old_logprobs, tokens.rollout_logprobs, options.rollout_correction, options.rollout_correction_cap
        )
        per_token = term.loss * correction - options.entropy_coef * tokens.entropy
        metrics = {
            "entropy": (entropy, tokens.mask),
            "rollout_correction/weight": (correction, tokens.mask),
            "rollout_correction/share": (corrected, tokens.mask),
        }
        if tokens.ref_logprobs is not None:
            kl = kl_estimate(tokens.logprobs, tokens.ref_logprobs, options.kl_estimator, options.kl_value_clamp)
            metrics["kl"] = (kl, tokens.mask)
            if options.kl_in == "loss":
                per_token = per_token + self._kl_weight(low_entropy, kl) * kl
        per_token = torch.where(tokens.mask, per_token, 0.0)
        weights = token_weights(tokens.mask, tokens.offsets, options, totals)
        loss = (weights * per_token).sum()
        shares = {"loss": loss, "policy_loss": (weights * term.loss * correction).sum()}
        return loss, _tally(metrics | _policy_metrics(tokens, term), shares, float(tokens.mask.sum()) / max(totals.tokens, 1))

    def _policy_term(self, tokens: ObjectiveTokens, low_entropy: Tensor) -> PolicyTerm:
        """Raises UserError for whatever a custom loss does wrong."""
        given = PolicyTokens(
            tokens.logprobs, tokens.old_logprobs, tokens.advantages, tokens.entropy.detach(), low_entropy, tokens.mask, tokens.offsets
        )
        if not is_custom(self.options.policy_loss):
            return self._policy_loss(given)
        try:
            term = self._policy_loss(given)
            if given.logprobs.requires_grad and not term.loss.requires_grad and given.advantages.any():
                raise ValueError("the loss carries no gradient")
            _check_finite(tokens, {"loss": term.loss})
        except BaseException as error:  # custom code may raise anything, SystemExit too
            raise UserError(
                f"algorithm.policy_loss={self.options.policy_loss}: {one_line(error)}; correct it, and try it with megatron-aspo check-loss"
            ) from error
        return term

    def _kl_weight(self, low_entropy: Tensor, like: Tensor) -> Tensor:
        """Return β of each token: by entropy class where the loss declares so, else the same for all."""
        coefficient = self.options.kl_coef
        other = self.options.high_entropy_kl_coef if self._declared.kl_by_entropy_class else coefficient
        return torch.where(low_entropy, like.new_full((), coefficient), like.new_full((), other))


def _without_uncounted(tokens: ObjectiveTokens) -> ObjectiveTokens:
    """Return the tokens with zeros where none counts: whatever is there must reach neither loss nor gradient (0 × inf is NaN)."""
    values = {f.name: getattr(tokens, f.name) for f in fields(tokens)}
    floats = {name: v for name, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return replace(tokens, **{name: torch.where(tokens.mask, v, 0.0) for name, v in floats.items()})


def _inputs(tokens: ObjectiveTokens) -> dict[str, Tensor]:
    """Return the inputs by the names that error messages use."""
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


Metrics = dict[str, tuple[Tensor, Tensor]]
"""Name → (values, which of them count), both [tokens]."""


@torch.no_grad()
def _policy_metrics(tokens: ObjectiveTokens, term: PolicyTerm) -> Metrics:
    """Return the policy loss's metrics, by sign of the advantage; tokens with A = 0 have no sign and no gradient."""
    distance = (term.weight - 1).abs()
    ratio = (tokens.logprobs - tokens.old_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    metrics = {"weight_distance": (distance, tokens.mask & (tokens.advantages != 0))}
    for sign, chosen in (("positive", tokens.advantages > 0), ("negative", tokens.advantages < 0)):
        chosen = chosen & tokens.mask
        metrics[f"hard_mask_share/{sign}"] = (term.masked, chosen)
        metrics[f"soft_cap_share/{sign}"] = (term.capped, chosen)
        metrics[f"weight/{sign}"] = (term.weight, chosen)
        metrics[f"weight_distance/{sign}"] = (distance, chosen)
        metrics[f"ratio/{sign}"] = (ratio, chosen)
    return metrics


@torch.no_grad()
def _tally(metrics: Metrics, shares: dict[str, Tensor], part: float) -> Tally:
    """Return sums and counts. The count of a share is the micro-batch's fraction of the mini-batch, so that shares add up to its loss."""
    sums = [torch.stack([torch.where(chosen, values.double(), 0.0).sum(), chosen.sum().double()]) for values, chosen in metrics.values()]
    # One transfer to the host for all metrics.
    totals = torch.stack([*sums, *(torch.stack([share.double(), share.new_full((), part).double()]) for share in shares.values())])
    return {name: (total, count) for name, (total, count) in zip([*metrics, *shares], totals.tolist(), strict=True)}
