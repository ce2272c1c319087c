"""Policy losses and the objective: values worked out by hand, and each policy loss against the float64 reference."""

from dataclasses import FrozenInstanceError, fields
from itertools import product

import numpy as np
import pytest
import torch

from megatron_aspo.losses.aggregation import Totals
from megatron_aspo.losses.find import find_policy_loss
from tests.reference import losses as reference
from tests.reference.losses import Response
from tests.unit import loss_cases as cases

DTYPES = [torch.float64, torch.float32]


def one_token(ratio: float, A: float) -> Response:
    logp = np.array([-1.0])
    return Response(logp, logp - np.log(ratio), logp, None, np.zeros(1), np.ones(1, bool), A)


def of_one_token(loss: str, ratio: float, A: float, low: bool = True, **options):
    """(term, ∂L/∂logp); logp is −1."""
    tokens = cases.policy_tokens([one_token(ratio, A)], [low])
    term = cases.policy_loss(loss, **options)(tokens)
    (gradient,) = torch.autograd.grad(term.loss.sum(), tokens.logprobs)
    return term, float(gradient)


# loss, r, A, low-entropy, value, gradient, weight, masked, capped; ε = 0.2, 0.4 where entropy is not low, c = 3
BY_HAND = [
    ("aspo", 1.1, 2.0, True, -2.0 / 1.1, -2.0 / 1.1, 1 / 1.1, False, False),
    ("aspo", 0.5, 2.0, True, -2.0 / 0.5, -2.0 / 0.5, 2.0, False, False),
    ("aspo", 0.2, 2.0, True, -6.0, -6.0, 3.0, False, True),
    ("aspo", 1.3, 2.0, True, -2.0 / 1.2, 0.0, 1 / 1.2, True, False),
    ("aspo", 1.3, 2.0, False, -2.0 / 1.3, -2.0 / 1.3, 1 / 1.3, False, False),
    ("aspo", 1.5, 2.0, False, -2.0 / 1.4, 0.0, 1 / 1.4, True, False),
    ("aspo", 1.1, -2.0, True, 2.2, 2.2, 1.1, False, False),
    ("aspo", 5.0, -2.0, True, 6.0, 6.0, 3.0, False, True),
    ("aspo", 0.7, -2.0, True, 1.6, 0.0, 0.8, True, False),
    ("aspo", 0.7, -2.0, False, 1.4, 1.4, 0.7, False, False),
    ("aspo", 0.5, -2.0, False, 1.2, 0.0, 0.6, True, False),
    ("ppo_clip", 1.1, 2.0, False, -2.2, -2.2, 1.1, False, False),
    ("ppo_clip", 1.3, 2.0, False, -2.4, 0.0, 1.2, True, False),
    ("ppo_clip", 0.5, 2.0, False, -1.0, -1.0, 0.5, False, False),
    ("ppo_clip", 9.0, 2.0, False, -2.4, 0.0, 1.2, True, False),
    ("ppo_clip", 0.7, -2.0, False, 1.6, 0.0, 0.8, True, False),
    ("ppo_clip", 0.9, -2.0, False, 1.8, 1.8, 0.9, False, False),
    ("ppo_clip", 2.5, -2.0, False, 5.0, 5.0, 2.5, False, False),
    ("ppo_clip", 3.5, -2.0, False, 6.0, 0.0, 3.0, False, True),
    ("archer", 1.3, 2.0, True, -2.4, 0.0, 1.2, True, False),
    ("archer", 1.3, 2.0, False, -2.6, -2.6, 1.3, False, False),
    ("archer", 1.5, 2.0, False, -2.8, 0.0, 1.4, True, False),
    ("archer", 0.7, -2.0, True, 1.6, 0.0, 0.8, True, False),
    ("archer", 0.7, -2.0, False, 1.4, 1.4, 0.7, False, False),
    ("archer", 0.5, -2.0, False, 1.2, 0.0, 0.6, True, False),
    ("archer", 3.5, -2.0, False, 6.0, 0.0, 3.0, False, True),
    ("gspo", 1.1, 2.0, False, -2.2, -2.2, 1.1, False, False),
    ("gspo", 1.3, 2.0, False, -2.4, 0.0, 1.2, True, False),
    ("gspo", 0.5, 2.0, False, -1.0, -1.0, 0.5, False, False),
    ("gspo", 0.7, -2.0, False, 1.6, 0.0, 0.8, True, False),
    ("gspo", 3.5, -2.0, False, 7.0, 7.0, 3.5, False, False),
    ("cispo", 1.1, 2.0, False, 2.2, -2.2, 1.1, False, False),
    ("cispo", 1.3, 2.0, False, 2.4, -2.4, 1.2, False, True),
    ("cispo", 1.3, -2.0, False, -2.4, 2.4, 1.2, False, True),
    ("cispo", 0.7, 2.0, False, 1.6, -1.6, 0.8, False, True),
    ("reinforce", 3.5, 2.0, True, 2.0, -2.0, 1.0, False, False),
    ("reinforce", 0.1, -2.0, True, -2.0, 2.0, 1.0, False, False),
    ("no_is", 1.1, 2.0, False, -2.0, -2.0, 1.0, False, False),
    ("no_is", 1.3, 2.0, False, -2.0, 0.0, 1.0, True, False),
    ("no_is", 0.5, 2.0, False, -2.0, -2.0, 1.0, False, False),
    ("no_is", 0.7, -2.0, False, 2.0, 0.0, 1.0, True, False),
    ("no_is", 3.5, -2.0, False, 2.0, 2.0, 1.0, False, False),
]


@pytest.mark.parametrize(("loss", "ratio", "A", "low", "value", "gradient", "weight", "masked", "capped"), BY_HAND)
def test_value_gradient_and_figures_are_those_worked_out_by_hand(loss, ratio, A, low, value, gradient, weight, masked, capped):
    term, got = of_one_token(loss, ratio, A, low)
    assert got == pytest.approx(gradient, rel=1e-12, abs=0)
    assert term.loss.item() == pytest.approx(value, rel=1e-12)
    assert term.weight.item() == pytest.approx(weight, rel=1e-12)
    assert (term.masked.item(), term.capped.item()) == (masked, capped)


def test_each_bound_has_an_option_of_its_own():
    own = {"clip_low": 0.1, "clip_high": 0.15, "high_entropy_clip_low": 0.3, "high_entropy_clip_high": 0.35}
    own |= {"dual_clip_neg": 1.6, "dual_clip_pos": 1.7}
    for loss, A, inside, outside, low in [
        ("aspo", -1.0, 0.91, 0.89, True),
        ("aspo", 1.0, 1.14, 1.16, True),
        ("aspo", -1.0, 0.71, 0.69, False),
        ("aspo", 1.0, 1.34, 1.36, False),
        ("archer", -1.0, 0.91, 0.89, True),
        ("archer", 1.0, 1.14, 1.16, True),
        ("archer", -1.0, 0.71, 0.69, False),
        ("archer", 1.0, 1.34, 1.36, False),
        *[(loss, A, *bounds, low) for loss in ("ppo_clip", "gspo", "no_is") for low in (True, False)
          for A, bounds in ((-1.0, (0.91, 0.89)), (1.0, (1.14, 1.16)))],
    ]:  # fmt: skip
        assert of_one_token(loss, inside, A, low, **own)[1] != 0, (loss, inside)
        assert of_one_token(loss, outside, A, low, **own)[1] == 0, (loss, outside)
    assert of_one_token("aspo", 1.7, -1.0, **own)[1] == pytest.approx(1.6, rel=1e-12)
    assert of_one_token("aspo", 0.5, 1.0, **own)[1] == pytest.approx(-1.7, rel=1e-12)
    for loss in ("ppo_clip", "archer"):
        assert of_one_token(loss, 1.59, -1.0, **own)[1] == pytest.approx(1.59, rel=1e-12)
        assert of_one_token(loss, 1.61, -1.0, **own)[1] == 0
    assert of_one_token("cispo", 0.5, 1.0, **own)[1] == pytest.approx(-0.9, rel=1e-12)
    assert of_one_token("cispo", 2.0, 1.0, **own)[1] == pytest.approx(-1.15, rel=1e-12)


def test_cispo_has_no_lower_bound_where_epsilon_is_one():
    term, gradient = of_one_token("cispo", 1e-6, 2.0, clip_low=1.0)
    assert gradient == pytest.approx(-2e-6, rel=1e-12) and not term.capped.item()


def test_the_sequence_ratio_is_of_the_counted_tokens_of_its_own_response():
    old = np.full(6, -1.0)
    logp = old + np.log([1.21, 99.0, 1.0, 0.9, 0.9, 7.0])
    mask = np.array([True, False, True, True, True, False])
    responses = [
        Response(logp[part], old[part], old[part], None, np.zeros(3), mask[part], A)
        for part, A in ((slice(0, 3), 1.0), (slice(3, 6), -1.0))
    ]
    term = cases.policy_loss("gspo", clip_low=0.05)(cases.policy_tokens(responses, [False] * 6))
    assert term.weight.numpy() == pytest.approx(np.repeat([1.1, 0.95], 3), rel=1e-12)  # √(1.21·1), and 0.9 cut at 0.95
    assert term.masked.tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("loss", cases.LOSSES)
def test_an_advantage_of_zero_gives_neither_loss_nor_gradient_nor_mask(loss):
    for ratio in (1e-3, 0.7, 1.0, 1.3, 50.0):
        term, gradient = of_one_token(loss, ratio, 0.0)
        assert term.loss.item() == 0 and gradient == 0 and not term.masked.item()
        assert loss not in ("ppo_clip", "archer") or not term.capped.item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", cases.LOSSES)
def test_policy_loss_is_the_reference(loss, dtype):
    options = cases.algorithm(policy_loss=loss, clip_low=0.3, high_entropy_clip_high=0.5, dual_clip_neg=2.5, dual_clip_pos=1.5)
    responses = cases.one_of_each(1)
    if dtype == torch.float32:
        responses = cases.float32(responses)
    low = np.random.default_rng(2).random(sum(len(r.mask) for r in responses)) < 0.6
    tokens = cases.policy_tokens(responses, low, dtype)
    term = find_policy_loss(options)(tokens)
    (gradient,) = torch.autograd.grad(term.loss.sum(), tokens.logprobs)
    relative, least = (1e-12, 0.0) if dtype == torch.float64 else (2e-6, 1.0)
    for i, response in enumerate(responses):
        mask = response.mask
        if not mask.any():
            continue
        part = slice(tokens.offsets[i], tokens.offsets[i + 1])
        want = reference.POLICY[loss](response.logp[mask], response.old[mask], response.A, low[part][mask], cases.by_name(options))
        of_response = (term.loss[part].detach(), gradient[part], term.weight[part])
        for got, truth in zip(of_response[: 3 if response.A else 2], (want.value, want.gradient, want.weight)):
            cases.assert_close(got[mask], truth, relative * np.maximum(np.abs(truth), least), f"{loss}, response {i}")
        assert term.masked[part][mask].tolist() == want.masked.tolist()
        if response.A:
            assert term.capped[part][mask].tolist() == want.capped.tolist()


@pytest.mark.parametrize("loss", cases.LOSSES)
def test_only_the_loss_of_a_term_carries_a_gradient_and_all_of_it_keeps_the_dtype(loss):
    for dtype in DTYPES:
        responses = cases.one_of_each()
        tokens = cases.policy_tokens(responses, [True] * sum(len(r.mask) for r in responses), dtype)
        term = cases.policy_loss(loss)(tokens)
        assert term.loss.requires_grad and not (term.weight.requires_grad or term.masked.requires_grad or term.capped.requires_grad)
        assert (term.loss.dtype, term.weight.dtype, term.masked.dtype, term.capped.dtype) == (dtype, dtype, torch.bool, torch.bool)
        assert {tensor.shape for tensor in (term.loss, term.weight, term.masked, term.capped)} == {tokens.logprobs.shape}


@pytest.mark.parametrize("sequence_count", ["counted", "full_mini_batch"])
@pytest.mark.parametrize("aggregation", cases.AGGREGATIONS)
def test_aggregation_of_two_responses_written_out(aggregation, sequence_count):
    """REINFORCE: the gradient is −A·w, with 2 of 3 and 1 of 2 tokens counted, and a response of which none is."""
    masks = [np.array([True, True, False]), np.array([False, True]), np.array([False]), np.zeros(0, bool)]
    responses = [Response(*[np.full(len(m), -1.0)] * 3, None, np.zeros(len(m)), m, A) for m, A in zip(masks, [1.0, -2.0, 5.0, 5.0])]
    options = cases.algorithm(policy_loss="reinforce", aggregation=aggregation, sequence_count=sequence_count)
    tokens = cases.as_tokens(responses)
    loss, _ = cases.objective(tokens, options, Totals(tokens=3, responses=2, full_responses=8, max_response_tokens=10))
    loss.backward()
    n = 8 if sequence_count == "full_mini_batch" else 2
    first, second = {
        "token_mean": (1 / 3, 1 / 3),
        "seq_mean_token_mean": (1 / n / 2, 1 / n),
        "seq_mean_token_sum": (1 / n, 1 / n),
        "seq_mean_token_sum_norm": (1 / n / 10, 1 / n / 10),
    }[aggregation]
    assert tokens.logprobs.grad.numpy() == pytest.approx(np.array([-first, -first, 0, 0, 2 * second, 0]), rel=1e-12)
    assert loss.item() == pytest.approx(2 * first - 2 * second, rel=1e-12)


@pytest.mark.parametrize("aggregation", cases.AGGREGATIONS)
def test_a_mini_batch_of_which_nothing_counts_is_a_loss_of_zero_with_a_gradient_of_zero(aggregation):
    """Empty, or wholly uncounted: another rank may have all the tokens, or there are none."""
    for lengths, totals in product(([], [0], [3, 0, 1]), (Totals(0, 0, 8, 10), Totals(7, 3, 8, 10))):
        masks = [np.zeros(n, bool) for n in lengths]
        for loss in cases.LOSSES:
            tokens = cases.as_tokens([cases.random_response(np.random.default_rng(3), mask) for mask in masks])
            value, tally = cases.objective(tokens, cases.algorithm(policy_loss=loss, aggregation=aggregation), totals)
            value.backward()
            assert value.item() == 0
            assert tokens.logprobs.grad.tolist() == tokens.entropy.grad.tolist() == [0] * sum(lengths)
            assert set(tally.values()) == {(0.0, 0.0)}


def test_groups_of_two_push_in_opposite_directions():
    """G = 2, on policy, equal lengths: A = ±1/√2 up to the 1e-6 in the denominator, and the gradients cancel token by token."""
    A = float(np.sqrt(0.5))
    responses = [one_token(1.0, A), one_token(1.0, -A)]
    tokens = cases.as_tokens(responses)
    cases.objective(tokens, cases.algorithm(), Totals(2, 2, 2, 8))[0].backward()
    assert tokens.logprobs.grad.numpy() == pytest.approx(np.array([-A / 2, A / 2]), rel=1e-12)


def test_the_records_of_the_losses_cannot_be_changed():
    tokens = cases.policy_tokens([one_token(1.0, 1.0)], [True])
    term, whole = cases.policy_loss("aspo")(tokens), cases.as_tokens([one_token(1.0, 1.0)])
    for record in (tokens, term, cases.algorithm(), Totals(1, 1, 1, 1), whole):
        with pytest.raises(FrozenInstanceError):
            setattr(record, fields(record)[0].name, None)
