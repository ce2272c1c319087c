"""Exactly on every border, and one unit in the last place beyond it.

Borders are laid where a ratio is: for r in [1/2, 2] both r − 1 and 1 + (r − 1) are exact (Sterbenz), so ε = r − 1 puts 1 + ε on r itself.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_aspo.losses.aggregation import Totals
from megatron_aspo.losses.find import find_policy_loss
from megatron_aspo.losses.terms import kl_estimate, low_entropy_tokens, quantile, rollout_correction
from tests.reference.losses import Response
from tests.unit import loss_cases as cases

EXACT = {torch.float64: 1e-12, torch.float32: 1e-6}
DTYPES = [torch.float64, torch.float32]
NUMPY = {torch.float64: np.float64, torch.float32: np.float32}
MASKING = ["aspo", "ppo_clip", "archer", "gspo", "no_is"]


def ratio_between(low: float, high: float, dtype: torch.dtype) -> tuple[float, float]:
    """(Δ, r) with r = exp(Δ) in the interval, on which torch and numpy agree to the last bit and of which 1/r has r as its inverse."""
    for step in range(1, 4000):
        difference = np.log(low) + step * (np.log(high) - np.log(low)) / 4000
        difference = float(np.round(difference * 1024) / 1024)  # so that logp − old is exact
        r = torch.tensor([difference], dtype=dtype).exp().item()
        if low < r < high and r == float(np.exp(NUMPY[dtype](difference))) and 1 / (1 / r) == r:
            return difference, r
    raise AssertionError("torch and numpy agree nowhere")


def below(value: float, dtype: torch.dtype) -> float:
    """The next smaller number of the dtype."""
    return float(np.nextafter(NUMPY[dtype](value), NUMPY[dtype](-np.inf)))


def above(value: float, dtype: torch.dtype) -> float:
    return float(np.nextafter(NUMPY[dtype](value), NUMPY[dtype](np.inf)))


def response(difference: float, A: float) -> Response:
    one = np.full(1, -1.0)
    return Response(one + difference, one, one, None, np.ones(1), np.ones(1, bool), A)


def term_and_gradient(loss: str, difference: float, A: float, low: bool, given: dict[str, float], dtype: torch.dtype):
    """At the border, by the policy loss; in float64 the objective is held to the reference there, too."""
    one = response(difference, A)
    options = cases.algorithm(policy_loss=loss, low_entropy_quantile=1.0 if low else 0.0, **given)
    if dtype == torch.float64 and low:
        cases.assert_objective_is_the_reference([one], options, what=f"{loss} {options}")
        tally = cases.objective(cases.as_tokens([one]), options, cases.totals([one], options))[1]
        cases.assert_tally_is_the_reference(tally, cases.truth([one], options), with_kl=False)
    tokens = cases.policy_tokens([one], [low], dtype)
    term = find_policy_loss(options)(tokens)
    (gradient,) = torch.autograd.grad(term.loss.sum(), tokens.logprobs)
    return term, gradient.item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("A", [1.5, -1.5])
@pytest.mark.parametrize("loss", MASKING)
def test_the_hard_mask_begins_strictly_outside_one_plus_or_minus_epsilon(loss, A, low, dtype):
    difference, r = ratio_between(1.05, 1.95, dtype) if A > 0 else ratio_between(0.55, 0.95, dtype)
    side = "high" if A > 0 else "low"
    option = f"clip_{side}" if low or loss not in ("aspo", "archer") else f"high_entropy_clip_{side}"
    inner = below(r, dtype) if A > 0 else above(r, dtype)
    weight = {"aspo": 1 / r if A > 0 else r, "no_is": 1.0}.get(loss, r)
    # The ε of the other class is far away, so that it cannot be the one that decides.
    for other in (0.0, 1.0):
        on = {f"clip_{side}": other, f"high_entropy_clip_{side}": other} | {option: abs(r - 1)}
        term, gradient = term_and_gradient(loss, difference, A, low, on, dtype)
        assert gradient == pytest.approx(-A * weight, rel=EXACT[dtype]) and not term.masked.item()
        term, gradient = term_and_gradient(loss, difference, A, low, on | {option: abs(inner - 1)}, dtype)
        assert gradient == 0 and term.masked.item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", MASKING)
def test_with_epsilon_zero_a_token_on_policy_is_not_masked(loss, dtype):
    none = dict.fromkeys(("clip_low", "clip_high", "high_entropy_clip_low", "high_entropy_clip_high"), 0.0)
    for low in (True, False):
        for A in (1.5, -1.5):
            term, gradient = term_and_gradient(loss, 0.0, A, low, none, dtype)
            assert gradient == -A and term.weight.item() == 1 and not term.masked.item()
            _, gradient = term_and_gradient(loss, 2.0**-10 if A > 0 else -(2.0**-10), A, low, none, dtype)
            assert gradient == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("A", [1.5, -1.5])
def test_asposs_cap_is_passed_strictly_above_c_and_keeps_the_gradient(A, dtype):
    difference, r = ratio_between(0.3, 0.45, dtype) if A > 0 else ratio_between(2.2, 3.0, dtype)
    weight = float(NUMPY[dtype](1) / NUMPY[dtype](r)) if A > 0 else r
    option = "dual_clip_pos" if A > 0 else "dual_clip_neg"
    term, gradient = term_and_gradient("aspo", difference, A, True, {option: weight}, dtype)
    assert (term.weight.item(), term.capped.item()) == (weight, False) and gradient == pytest.approx(-A * weight, rel=EXACT[dtype])
    lower = below(weight, dtype)
    term, gradient = term_and_gradient("aspo", difference, A, True, {option: lower}, dtype)
    assert (term.weight.item(), term.capped.item()) == (lower, True) and gradient == pytest.approx(-A * lower, rel=EXACT[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", ["ppo_clip", "archer"])
def test_the_dual_clip_cuts_the_gradient_strictly_above_c(loss, dtype):
    difference, r = ratio_between(2.2, 3.0, dtype)
    term, gradient = term_and_gradient(loss, difference, -1.5, True, {"dual_clip_neg": r}, dtype)
    assert (term.weight.item(), term.capped.item()) == (r, False)
    assert (term.loss.item(), gradient) == pytest.approx((1.5 * r, 1.5 * r), rel=EXACT[dtype])
    lower = below(r, dtype)
    term, gradient = term_and_gradient(loss, difference, -1.5, True, {"dual_clip_neg": lower}, dtype)
    assert (term.weight.item(), term.capped.item()) == (lower, True)
    assert (term.loss.item(), gradient) == (pytest.approx(1.5 * lower, rel=EXACT[dtype]), 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cispo_counts_a_weight_as_capped_strictly_outside_its_bounds(dtype):
    for (difference, r), inward, option in (
        (ratio_between(1.05, 1.95, dtype), below, "clip_high"),
        (ratio_between(0.55, 0.95, dtype), above, "clip_low"),
    ):
        term, gradient = term_and_gradient("cispo", difference, 1.5, True, {option: abs(r - 1)}, dtype)
        assert (term.weight.item(), term.capped.item()) == (r, False) and gradient == pytest.approx(-1.5 * r, rel=EXACT[dtype])
        bound = inward(r, dtype)
        term, gradient = term_and_gradient("cispo", difference, 1.5, True, {option: abs(bound - 1)}, dtype)
        assert (term.weight.item(), term.capped.item()) == (bound, True) and gradient == pytest.approx(-1.5 * bound, rel=EXACT[dtype])


def test_the_log_ratio_has_its_gradient_up_to_20_and_none_beyond():
    wide = cases.policy_loss("ppo_clip", clip_low=1.0, clip_high=1e12, dual_clip_neg=1e12)
    old = torch.zeros(1, dtype=torch.float64)
    for difference, moves in ((20.0, True), (above(20.0, torch.float64), False), (-20.0, True), (below(-20.0, torch.float64), False)):
        for A in (1.5, -1.5):
            tokens = cases.policy_tokens([response(0.0, A)], [True])
            tokens = replace(tokens, logprobs=(old + difference).requires_grad_(), old_logprobs=old)
            (gradient,) = torch.autograd.grad(wide(tokens).loss.sum(), tokens.logprobs)
            assert gradient.item() == pytest.approx(-A * np.exp(difference) * moves, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rollout_correction_acts_strictly_outside_its_cap(dtype):
    zero = torch.zeros(1, dtype=dtype)
    difference, u = ratio_between(1.5, 3.0, dtype)
    old = zero + difference
    assert [t.item() for t in rollout_correction(old, zero, "tis", u)] == pytest.approx([u, False])
    assert [t.item() for t in rollout_correction(old, zero, "tis", below(u, dtype))] == [below(u, dtype), True]
    assert [t.item() for t in rollout_correction(old, zero, "mask", u)] == [1, False]
    assert [t.item() for t in rollout_correction(old, zero, "mask", below(u, dtype))] == [0, True]
    difference, u = ratio_between(0.3, 0.7, dtype)
    old = zero + difference
    assert [t.item() for t in rollout_correction(old, zero, "mask", 1 / u)] == [1, False]
    assert [t.item() for t in rollout_correction(old, zero, "mask", 1 / above(u, dtype))] == [0, True]
    assert [t.item() for t in rollout_correction(old, zero, "tis", 1.1)] == [u, False]
    assert [t.item() for t in rollout_correction(old, zero, "none", 1.1)] == [1, False]


@pytest.mark.parametrize("name", ["tis", "mask"])
def test_the_objective_at_the_correction_s_cap_is_the_reference(name):
    for difference, u in (ratio_between(1.5, 3.0, torch.float64), ratio_between(0.3, 0.7, torch.float64)):
        one = np.full(1, -1.0)
        given = Response(one + 0.05, one, one - difference, None, np.ones(1), np.ones(1, bool), 1.5)
        for border in (max(u, 1 / u), below(max(u, 1 / u), torch.float64), above(max(u, 1 / u), torch.float64)):
            options = cases.algorithm(rollout_correction=name, rollout_correction_cap=border)
            cases.assert_objective_is_the_reference([given], options)


@pytest.mark.parametrize(("estimator", "x"), [("k1", 1.5), ("k1", -1.5), ("k2", 1.5), ("k2", -1.5), ("k3", 1.5), ("k3", -1.5)])
def test_the_value_clamp_of_kl_stops_value_and_gradient_strictly_beyond_it(estimator, x):
    logp = torch.tensor([-2.0], dtype=torch.float64)
    size = abs(kl_estimate(logp, logp + x, estimator).item())
    assert size == pytest.approx({"k1": 1.5, "k2": 1.125, "k3": np.exp(x) - x - 1}[estimator], rel=1e-12)
    slope = {"k1": 1.0, "k2": -x, "k3": 1 - np.exp(x)}[estimator]
    sign = -np.sign(x) if estimator == "k1" else 1
    for clamp, gradient in ((size, slope), (below(size, torch.float64), 0.0), (above(size, torch.float64), slope)):
        logp = logp.detach().requires_grad_()
        value = kl_estimate(logp, logp.detach() + x, estimator, clamp)
        value.sum().backward()
        assert value.item() == sign * min(clamp, size)
        assert logp.grad.item() == pytest.approx(gradient, rel=1e-12, abs=0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_log_ratio_of_kl_has_its_gradient_up_to_20_and_none_beyond(estimator):
    for x, moves in ((20.0, True), (above(20.0, torch.float64), False), (-20.0, True), (below(-20.0, torch.float64), False)):
        logp = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        value = kl_estimate(logp, torch.full((1,), x, dtype=torch.float64), estimator)
        value.sum().backward()
        at = 20.0 if x > 0 else -20.0
        assert value.item() == pytest.approx({"k1": -at, "k2": 200.0, "k3": np.exp(at) - at - 1}[estimator], rel=1e-12)
        assert logp.grad.item() == pytest.approx({"k1": 1.0, "k2": -at, "k3": 1 - np.exp(at)}[estimator] * moves, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("entropy", "q", "low"),
    [
        ([3.0, 1.0, 2.0, 6.0, 5.0, 4.0], 0.8, [1, 1, 1, 0, 1, 1]),  # 0.8 × 5 = 4: the fifth itself
        ([1.0, 2.0, 2.0, 2.0, 2.0, 3.0], 0.8, [1, 1, 1, 1, 1, 0]),  # a tie at the quantile
        ([1.0, 1.0, 1.0, 1.0, 3.0, 3.0], 0.8, [1, 1, 1, 1, 1, 1]),
        ([0.75] * 7, 0.8, [1] * 7),
        ([0.75] * 7, 0.0, [1] * 7),
        ([5.0, 4.0, 3.0, 3.0], 0.0, [0, 0, 1, 1]),
        ([5.0, 4.0, 3.0, 6.0], 1.0, [1, 1, 1, 1]),
        ([0.25], 0.8, [1]),
        ([0.0, 1.0], 0.8, [1, 0]),
        ([], 0.8, []),
    ],
)
def test_low_entropy_takes_in_the_quantile_itself(entropy, q, low, dtype):
    values = torch.tensor(entropy, dtype=dtype)
    assert low_entropy_tokens(values, torch.ones(len(entropy), dtype=torch.bool), [0, len(entropy)], q).tolist() == [bool(x) for x in low]
    n = len(entropy)
    if n:
        arrays = np.full((3, n), -1.0)
        # r = 1.31 passes with the ε of high entropy alone.
        given = Response(arrays[0] + 0.27, *arrays[1:], None, np.array(entropy), np.ones(n, bool), 1.0)
        options = cases.algorithm(low_entropy_quantile=q)
        for scope in cases.SCOPES:
            cases.assert_objective_is_the_reference([given], replace(options, entropy_quantile_scope=scope), dtype)
        tokens = cases.as_tokens([given], dtype)
        cases.objective(tokens, options, Totals(n, 1, 1, n))[0].backward()
        assert [g == 0 for g in tokens.logprobs.grad.tolist()] == [bool(x) for x in low]


def test_a_threshold_one_ulp_under_an_entropy_leaves_it_high():
    entropy = torch.tensor([0.7], dtype=torch.float64)
    for threshold, low in ((0.7, True), (below(0.7, torch.float64), False)):
        assert low_entropy_tokens(entropy, torch.ones(1, dtype=torch.bool), [0, 1], 0.8, threshold).tolist() == [low]


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("n", [1, 2, 3, 6, 11, 100])
def test_quantile_is_numpys_linear_one(n, q):
    values = np.random.default_rng(n).normal(0, 1, n)
    assert quantile(torch.from_numpy(values), q) == pytest.approx(np.quantile(values, q), rel=1e-14)
    assert quantile(torch.from_numpy(values.astype(np.float32)), q) == pytest.approx(
        np.quantile(values.astype(np.float32).astype(np.float64), q), rel=1e-14
    )
