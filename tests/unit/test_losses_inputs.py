"""What the objective refuses, what it overlooks, and where gradients may go."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_aspo.losses.aggregation import Totals
from megatron_aspo.losses.objective import ObjectiveTokens
from tests.unit import loss_cases as cases

INPUTS = {
    "logprobs": "logprob",
    "entropy": "entropy",
    "old_logprobs": "old logprob",
    "rollout_logprobs": "rollout logprob",
    "ref_logprobs": "reference logprob",
    "advantages": "advantage",
}
BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def five_responses() -> ObjectiveTokens:
    """Of 3, 0, 2, 1 and 4 tokens, all counted."""
    random = np.random.default_rng(5)
    return cases.as_tokens([cases.random_response(random, np.ones(n, bool), extremes=False) for n in (3, 0, 2, 1, 4)])


def spoiled(tokens: ObjectiveTokens, name: str, at: int, value: float, counted: bool = True) -> ObjectiveTokens:
    values, mask = getattr(tokens, name).detach().clone(), tokens.mask.clone()
    values[at], mask[at] = value, counted
    return replace(tokens, **{name: values.requires_grad_(name in ("logprobs", "entropy")), "mask": mask})


@pytest.mark.parametrize("written", BAD)
@pytest.mark.parametrize(("name", "what"), INPUTS.items())
def test_a_non_finite_number_on_a_counted_token_is_an_error_that_names_the_sample(name, what, written):
    for at, sample, token in ((0, 0, 0), (2, 0, 2), (3, 2, 0), (4, 2, 1), (5, 3, 0), (6, 4, 0), (9, 4, 3)):
        tokens = spoiled(five_responses(), name, at, BAD[written])
        with pytest.raises(FloatingPointError) as error:
            cases.objective(tokens, cases.algorithm(), Totals(10, 4, 8, 8))
        assert str(error.value) == f"sample p{sample}[0]: {what} of response token {token} is {written}"


def test_the_message_is_made_of_plain_numbers():
    """A number taken from a tensor with a gradient would warn."""
    tokens = spoiled(five_responses(), "logprobs", 4, BAD["nan"])
    with cases.warnings_are_errors(), pytest.raises(FloatingPointError):
        cases.objective(tokens, cases.algorithm(), Totals(10, 4, 8, 8))


def test_inputs_are_looked_at_where_there_is_no_reference():
    tokens = replace(spoiled(five_responses(), "advantages", 4, BAD["nan"]), ref_logprobs=None)
    with pytest.raises(FloatingPointError, match=r"^sample p2\[0\]: advantage of response token 1 is nan$"):
        cases.objective(tokens, cases.algorithm(), Totals(10, 4, 8, 8))


def test_the_first_non_finite_number_is_the_one_reported():
    tokens = spoiled(spoiled(five_responses(), "logprobs", 7, BAD["nan"]), "logprobs", 4, BAD["inf"])
    with pytest.raises(FloatingPointError, match=r"^sample p2\[0\]: logprob of response token 1 is inf$"):
        cases.objective(tokens, cases.algorithm(), Totals(10, 4, 8, 8))


@pytest.mark.parametrize("written", BAD)
@pytest.mark.parametrize("name", INPUTS)
def test_a_non_finite_number_on_an_uncounted_token_harms_neither_loss_nor_gradient_nor_figures(name, written):
    for loss in cases.LOSSES:
        options = cases.algorithm(
            policy_loss=loss, aggregation="seq_mean_token_mean", rollout_correction="tis", entropy_coef=0.01, kl_coef=0.1
        )
        outcomes = []
        for value in (BAD[written], 0.25):
            tokens = spoiled(five_responses(), name, 4, value, counted=False)
            total, tally = cases.objective(tokens, options, Totals(9, 4, 8, 8))
            total.backward()
            outcomes.append((total.item(), tokens.logprobs.grad.tolist(), tokens.entropy.grad.tolist(), tally))
        assert np.isfinite(outcomes[0][1]).all() and outcomes[0][1][4] == outcomes[0][2][4] == 0
        assert outcomes[0] == outcomes[1]


def test_a_reference_is_not_needed():
    tokens = replace(five_responses(), ref_logprobs=None)
    _, tally = cases.objective(tokens, cases.algorithm(kl_coef=0.0), Totals(10, 4, 8, 8))
    assert "kl" not in tally


@pytest.mark.parametrize("loss", cases.LOSSES)
def test_only_log_probabilities_and_the_entropy_bonus_take_a_gradient(loss):
    """Ratio weights, entropy classes, corrections and KL pass none to anything else."""
    for coefficient in (0.0, 0.01):
        options = cases.algorithm(policy_loss=loss, entropy_coef=coefficient, rollout_correction="tis", kl_coef=0.1)
        tokens = five_responses()
        total, _ = cases.objective(tokens, options, Totals(10, 4, 8, 8))
        total.backward()
        assert tokens.entropy.grad.tolist() == pytest.approx([-coefficient / 10] * 10, rel=1e-12)
        assert tokens.logprobs.grad.abs().sum() > 0


def test_without_gradients_the_objective_has_the_same_value():
    """As in an evaluation."""
    tokens, options = five_responses(), cases.algorithm()
    with torch.no_grad():
        value, _ = cases.objective(tokens, options, Totals(10, 4, 8, 8))
    assert not value.requires_grad
    responses = [cases.Response(**r.__dict__) for r in rebuilt(tokens)]
    assert value.item() == pytest.approx(cases.reference.mini_batch(responses, cases.by_name(options), 8, 8).loss, rel=1e-12)


def rebuilt(tokens: ObjectiveTokens) -> list[cases.Response]:
    spans = zip(tokens.offsets[:-1], tokens.offsets[1:])
    arrays = [tokens.logprobs, tokens.old_logprobs, tokens.rollout_logprobs, tokens.ref_logprobs, tokens.entropy, tokens.mask]
    return [
        cases.Response(
            *[a[start:stop].detach().numpy() for a in arrays], A=tokens.advantages[start:stop].sum().item() / max(stop - start, 1)
        )
        for start, stop in spans
    ]
