"""The losses in numpy float64, one response after another, derivatives by hand: the reference for `megatron_aspo.losses`.

A is the advantage of a response, Δ = logp − old, r = exp(Δ) with Δ bounded to ±20, H entropy, β the weight of the KL estimate. `o` holds
the options under the names of a recipe. Every array is [tokens] of one response and, except in `mini_batch`, only of its counted tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


class Term(NamedTuple):
    """A policy loss, per token."""

    value: Array
    gradient: Array
    """∂value/∂logp."""
    weight: Array
    """w in the gradient −A·w·∇logp; for hard-masked tokens, the clip bound they hit."""
    masked: Array
    capped: Array


def hard_mask(ratio: Array, A: float, below: Array | float, above: Array | float) -> Array:
    """Zero gradient where A < 0 and r < 1 − ε, or A > 0 and r > 1 + ε: strictly outside."""
    if A < 0:
        return ratio < below
    return ratio > above if A > 0 else np.zeros(ratio.shape, bool)


def class_bounds(low: Array, o: Any) -> tuple[Array, Array]:
    """1 − ε, 1 + ε with the ε of each token's entropy class."""
    return 1 - np.where(low, o.clip_low, o.high_entropy_clip_low), 1 + np.where(low, o.clip_high, o.high_entropy_clip_high)


def aspo(logp: Array, old: Array, A: float, low: Array, o: Any) -> Term:
    """w = r for A < 0 and 1/r for A > 0, at most c; L = −A·sg(w)·ρ, or constant at the clip bound where masked."""
    r = np.exp(np.clip(logp - old, -20, 20))
    below, above = class_bounds(low, o)
    masked = hard_mask(r, A, below, above)
    if A > 0:
        w, c = np.where(masked, 1 / above, 1 / r), o.dual_clip_pos
    else:
        w, c = np.where(masked, below, r), o.dual_clip_neg
    capped, w = w > c, np.minimum(w, c)
    return Term(-A * w, np.where(masked, 0, -A * w), w, masked, capped)


def clipped(logp: Array, old: Array, A: float, below: Array | float, above: Array | float, c: float) -> Term:
    """−min(r·A, clip(r)·A), at most −c·A where A < 0; ∂r/∂logp = r, and 0 beyond |Δ| = 20."""
    delta = logp - old
    r = np.exp(np.clip(delta, -20, 20))
    value = -np.minimum(r * A, np.clip(r, below, above) * A)
    if A < 0:
        value = np.minimum(value, -c * A)
    masked, capped = hard_mask(r, A, below, above), (r > c) & (A < 0)
    slope = np.where(np.abs(delta) <= 20, r, 0)
    weight = np.where(masked, np.clip(r, below, above), np.where(capped, c, r))
    return Term(value, np.where(masked | capped, 0, -A * slope), weight, masked, capped)


def ppo_clip(logp: Array, old: Array, A: float, low: Array, o: Any) -> Term:
    return clipped(logp, old, A, 1 - o.clip_low, 1 + o.clip_high, o.dual_clip_neg)


def archer(logp: Array, old: Array, A: float, low: Array, o: Any) -> Term:
    """ppo_clip with ε by entropy class."""
    return clipped(logp, old, A, *class_bounds(low, o), o.dual_clip_neg)


def gspo(logp: Array, old: Array, A: float, low: Array, o: Any) -> Term:
    """s = exp(mean Δ) of the response, the mean bounded as Δ is; L = −A·sg(s)·ρ, or constant at the clip bound where masked."""
    s = np.full(logp.shape, np.exp(np.clip(np.mean(logp - old), -20, 20)))
    below, above = 1 - o.clip_low, 1 + o.clip_high
    masked = hard_mask(s, A, below, above)
    w = np.where(masked, np.clip(s, below, above), s)
    return Term(-A * w, np.where(masked, 0, -A * w), w, masked, np.zeros(logp.shape, bool))


def cispo(logp: Array, old: Array, A: float, low: Array, o: Any) -> Term:
    """−A·sg(r within [1 − ε, 1 + ε])·logp."""
    r = np.exp(np.clip(logp - old, -20, 20))
    w = np.clip(r, 1 - o.clip_low, 1 + o.clip_high)
    return Term(-A * w * logp, -A * w, w, np.zeros(logp.shape, bool), w != r)


def reinforce(logp: Array, old: Array, A: float, low: Array, o: Any) -> Term:
    """−A·logp."""
    one, never = np.ones(logp.shape), np.zeros(logp.shape, bool)
    return Term(-A * logp, -A * one, one, never, never)


def no_is(logp: Array, old: Array, A: float, low: Array, o: Any) -> Term:
    """−A·ρ under the hard mask of ppo_clip."""
    one, never = np.ones(logp.shape), np.zeros(logp.shape, bool)
    masked = hard_mask(np.exp(np.clip(logp - old, -20, 20)), A, 1 - o.clip_low, 1 + o.clip_high)
    return Term(-A * one, np.where(masked, 0, -A * one), one, masked, never)


POLICY = {f.__name__: f for f in (aspo, ppo_clip, archer, gspo, cispo, reinforce, no_is)}


def kl(logp: Array, ref: Array, estimator: str, clamp: float) -> tuple[Array, Array]:
    """Value and ∂/∂logp. x = ref − logp bounded to ±20; k1 = −x, k2 = x²/2, k3 = e^x − x − 1; a clamp > 0 bounds the value to ± itself."""
    x = np.clip(ref - logp, -20, 20)
    value = {"k1": -x, "k2": x**2 / 2, "k3": np.expm1(x) - x}[estimator]
    by_x = {"k1": -np.ones(x.shape), "k2": x, "k3": np.expm1(x)}[estimator]
    gradient = np.where(np.abs(ref - logp) <= 20, -by_x, 0)
    if clamp:
        gradient = np.where(np.abs(value) > clamp, 0, gradient)
        value = np.clip(value, -clamp, clamp)
    return value, gradient


def correction(old: Array, rollout: Array, o: Any) -> tuple[Array, Array]:
    """Factor on the policy term, and where it is not the plain one: u = exp(old − rollout) against C."""
    u, C = np.exp(np.clip(old - rollout, -20, 20)), o.rollout_correction_cap
    if o.rollout_correction == "tis":
        return np.minimum(u, C), u > C
    if o.rollout_correction == "mask":
        outside = (u < 1 / C) | (u > C)
        return np.where(outside, 0.0, 1.0), outside
    return np.ones(u.shape), np.zeros(u.shape, bool)


def token_weight(counted: int, o: Any, tokens: int, responses: int, max_response_tokens: int) -> float:
    """Return the weight of each of a response's `counted` tokens. tokens, responses: counted ones of the whole mini-batch."""
    return {
        "token_mean": 1 / tokens,
        "seq_mean_token_mean": 1 / responses / counted,
        "seq_mean_token_sum": 1 / responses,
        "seq_mean_token_sum_norm": 1 / responses / max_response_tokens,
    }[o.aggregation]


@dataclass(frozen=True)
class Response:
    logp: Array
    old: Array
    rollout: Array
    ref: Array | None
    entropy: Array
    mask: Array
    A: float

    def map(self, function) -> "Response":
        """Return the response with `function` applied to all arrays of numbers."""
        arrays = {name: getattr(self, name) for name in ("logp", "old", "rollout", "ref", "entropy")}
        return replace(self, **{name: function(array) for name, array in arrays.items() if array is not None})


class Result(NamedTuple):
    """The result of a mini-batch: first the sums, then [all tokens], then [counted tokens]."""

    loss: float
    policy_loss: float
    logp_gradient: Array
    """∂loss/∂logp."""
    entropy_gradient: Array
    """∂loss/∂H."""
    token_weight: Array
    largest_value: Array
    """The largest term in the sum that is a token's loss, before its weight; and the largest in its gradient."""
    largest_gradient: Array
    A: Array
    term: Term
    ratio: Array
    correction: Array
    corrected: Array
    kl: Array | None
    entropy: Array


def entropy_threshold(responses: Sequence[Response], o: Any) -> float | None:
    """Return the quantile over all counted tokens of the mini-batch, where that is the scope."""
    counted = np.concatenate([np.zeros(0), *[r.entropy[r.mask] for r in responses]])
    return float(np.quantile(counted, o.low_entropy_quantile)) if o.entropy_quantile_scope == "mini_batch" and counted.size else None


def mini_batch(responses: Sequence[Response], o: Any, full_responses: int, max_response_tokens: int) -> Result:
    """Σ over counted tokens of w·(policy·correction + β·KL − entropy_coef·H)."""
    tokens = sum(int(r.mask.sum()) for r in responses)
    counted_responses = sum(bool(r.mask.any()) for r in responses)
    divisor = full_responses if o.sequence_count == "full_mini_batch" else counted_responses
    common = entropy_threshold(responses, o)
    loss = policy_loss = 0.0
    on_all: list[list[Array]] = []
    on_counted: list[tuple] = []
    for response in responses:
        mask = response.mask
        n = int(mask.sum())
        spread = [np.zeros(len(mask)) for _ in range(5)]
        on_all.append(spread)
        if n == 0:
            continue
        logp, old, rollout, H = (a[mask] for a in (response.logp, response.old, response.rollout, response.entropy))
        threshold = np.quantile(H, o.low_entropy_quantile) if common is None else common
        low = threshold >= H
        term = POLICY[o.policy_loss](logp, old, response.A, low, o)
        factor, corrected = correction(old, rollout, o)
        w = token_weight(n, o, tokens, divisor, max_response_tokens)
        value, gradient = term.value * factor, term.gradient * factor
        loss += w * (value.sum() - o.entropy_coef * H.sum())
        policy_loss += w * value.sum()
        largest_value, largest_gradient = np.maximum(np.abs(value), o.entropy_coef * H), np.abs(gradient)
        estimate = None
        if response.ref is not None:
            estimate, slope = kl(logp, response.ref[mask], o.kl_estimator, o.kl_value_clamp)
            beta = np.where(low, o.kl_coef, o.high_entropy_kl_coef) if o.policy_loss == "archer" else np.full(n, o.kl_coef)
            if o.kl_in == "loss":
                loss += w * (beta * estimate).sum()
                gradient = gradient + beta * slope
                # k3 and its gradient are differences of e^x, 1 and x.
                largest_value = np.maximum(largest_value, beta * np.maximum(1, np.abs(estimate)))
                largest_gradient = np.maximum(largest_gradient, beta * np.maximum(1, np.abs(slope)))
        for array, values in zip(spread, (w * gradient, -w * o.entropy_coef, w, largest_value, largest_gradient)):
            array[mask] = values
        ratio = np.exp(np.clip(logp - old, -20, 20))
        on_counted.append((np.full(n, response.A), *term, ratio, factor, corrected, estimate, H))
    columns = [np.concatenate([np.zeros(0), *column]) for column in zip(*on_all)] or [np.zeros(0)] * 5
    joined = [None if column[0] is None else np.concatenate(column) for column in zip(*on_counted)] or [np.zeros(0)] * 11
    A, value, gradient, weight, masked, capped, *rest = joined
    return Result(loss, policy_loss, *columns, A, Term(value, gradient, weight, masked, capped), *rest)


def figures(result: Result) -> dict[str, tuple[float, float]]:
    """Return every metric of a whole mini-batch as (sum, count)."""
    A, term, every = result.A, result.term, np.ones(len(result.A), bool)
    table = {
        "entropy": (result.entropy, every),
        "rollout_correction/weight": (result.correction, every),
        "rollout_correction/share": (result.corrected, every),
        "weight_distance": (np.abs(term.weight - 1), A != 0),
    }
    if result.kl is not None:
        table["kl"] = (result.kl, every)
    for sign, chosen in (("positive", A > 0), ("negative", A < 0)):
        table[f"hard_mask_share/{sign}"] = (term.masked, chosen)
        table[f"soft_cap_share/{sign}"] = (term.capped, chosen)
        table[f"weight/{sign}"] = (term.weight, chosen)
        table[f"weight_distance/{sign}"] = (np.abs(term.weight - 1), chosen)
        table[f"ratio/{sign}"] = (result.ratio, chosen)
    sums = {name: (float(values[chosen].sum()), float(chosen.sum())) for name, (values, chosen) in table.items()}
    part = float(len(A) > 0)
    return sums | {"loss": (result.loss, part), "policy_loss": (result.policy_loss, part)}


def grpo(rewards: Sequence[float], std: bool) -> list[float]:
    """Return the advantages of one group: (R − mean) / (std + 1e-6), std with n − 1; without `std` R − mean."""
    n, mean = len(rewards), sum(rewards) / len(rewards)
    deviation = (sum((R - mean) ** 2 for R in rewards) / (n - 1)) ** 0.5
    return [(R - mean) / (deviation + 1e-6) if std else R - mean for R in rewards]


def rloo(rewards: Sequence[float]) -> list[float]:
    """Return the advantages of one group: R minus the mean of the others."""
    return [R - np.mean([*rewards[:i], *rewards[i + 1 :]]) for i, R in enumerate(rewards)]


def reinforce_plus_plus(rewards: Sequence[float], groups: Sequence[int], counted: Sequence[int], subtract_group_mean: bool) -> list[float]:
    """Return a step's advantages: R, or R minus its group's mean, whitened over counted tokens: less their mean, over their std + 1e-8."""
    if subtract_group_mean:
        rewards = [R - np.mean([other for other, g in zip(rewards, groups) if g == group]) for R, group in zip(rewards, groups)]
    tokens = np.repeat(rewards, counted)  # every token with its response's R
    return [(R - tokens.mean()) / (tokens.std() + 1e-8) for R in rewards]


def overlong_penalty(length: int, longest: int, buffer: int, factor: float) -> float:
    """Return 0 up to longest − buffer, then a linear decrease to −factor at `longest`."""
    return -factor * max(0, length - (longest - buffer)) / buffer if buffer else 0.0
