"""Policy losses of the user's own, by path."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_aspo.common.errors import UserError
from megatron_aspo.losses import registry
from megatron_aspo.losses.aggregation import Totals
from megatron_aspo.losses.find import find_policy_loss
from megatron_aspo.losses.options import AlgorithmOptions
from tests.reference.losses import Response
from tests.unit import loss_cases as cases, user_losses

HERE = "tests.unit.user_losses"


def options(name: str, **given) -> AlgorithmOptions:
    return AlgorithmOptions(policy_loss=f"{HERE}:{name}", policy_loss_options=given)


def three_responses() -> list[Response]:
    """Of 3, 2 and 1 tokens with A = 2, −0.5 and 0; the second token of the second does not count."""
    logp = [np.array([-1.0, -2.0, -4.0]), np.array([-3.0, -0.5]), np.array([-1.5])]
    masks = [np.ones(3, bool), np.array([True, False]), np.ones(1, bool)]
    return [Response(p, p - 0.125, p, None, p * 0 + 1, m, A) for p, m, A in zip(logp, masks, (2.0, -0.5, 0.0))]


def term_of(name: str, **given):
    settings = options(name, **given)
    return find_policy_loss(settings)(cases.policy_tokens(three_responses(), [True] * 6))


def refusal(settings: AlgorithmOptions) -> str:
    with pytest.raises(UserError) as error:
        find_policy_loss(settings)
    return str(error.value)


@pytest.mark.parametrize("name", cases.LOSSES)
def test_a_built_in_loss_is_found_by_name_and_gets_its_options(name):
    options = cases.algorithm(policy_loss=name)
    module, _, function = registry.POLICY_LOSSES[name].partition(":")
    tokens = cases.policy_tokens(three_responses(), [True] * 6)
    direct = getattr(importlib.import_module(module), function)(tokens, **options.policy_loss_options)
    found = find_policy_loss(options)(tokens)
    same = {"loss": direct} if isinstance(direct, torch.Tensor) else vars(direct)
    assert all(torch.equal(values, getattr(found, part)) for part, values in same.items())


def test_a_bare_loss_is_taken_as_it_is_with_its_options():
    tokens = cases.as_tokens(three_responses())
    cases.objective(tokens, options("weighted"), Totals(5, 3, 3, 8))[0].backward()
    assert tokens.logprobs.grad.tolist() == pytest.approx([-0.2, -0.2, -0.2, 0.05, 0, 0], rel=1e-12)
    tokens = cases.as_tokens(three_responses())
    loss, _ = cases.objective(tokens, options("weighted", weight=3.0, floor=-2.5), Totals(5, 3, 3, 8))
    loss.backward()
    assert tokens.logprobs.grad.tolist() == pytest.approx([-1.2, -1.2, 0, 0, 0, 0], rel=1e-12)
    assert loss.item() == pytest.approx((6 * (1 + 2 + 2.5) + 1.5 * -2.5) / 5, rel=1e-12)


def test_the_figures_of_a_bare_loss_are_those_of_its_gradient():
    """w = −g/A; masked where A ≠ 0 and g = 0; capped nowhere. The token that does not count stands at logp = 0."""
    term = term_of("weighted", weight=3.0, floor=-2.5)
    assert term.weight.tolist() == pytest.approx([3, 3, 0, 0, 3, 0], rel=1e-12)
    assert term.masked.tolist() == [False, False, True, True, False, False]
    assert term.capped.tolist() == [False] * 6
    assert term.loss.requires_grad and not term.weight.requires_grad and term.weight.dtype == torch.float64
    assert (term.masked.dtype, term.capped.dtype) == (torch.bool, torch.bool)


def test_the_figures_of_a_bare_loss_leave_its_graph_for_the_backward_pass():
    settings = options("weighted")
    tokens = cases.policy_tokens(three_responses(), [True] * 6)
    find_policy_loss(settings)(tokens).loss.sum().backward()
    assert tokens.logprobs.grad.tolist() == [-1.0, -1.0, -1.0, 0.25, 0.25, 0.0]


def test_a_loss_over_whole_responses_gets_the_means_of_their_counted_tokens():
    term = term_of("per_response")
    assert term.loss.tolist() == pytest.approx([-0.25] * 3 + [0.0625] * 2 + [0], rel=1e-12)
    tokens = cases.as_tokens(three_responses())
    cases.objective(tokens, options("per_response"), Totals(5, 3, 3, 8))[0].backward()
    assert tokens.logprobs.grad.tolist() == pytest.approx([-0.4] * 3 + [0.1, 0, 0], rel=1e-12)


def test_a_policy_term_is_taken_with_its_own_figures():
    tokens = cases.as_tokens(three_responses())
    _, tally = cases.objective(tokens, options("with_figures"), Totals(5, 3, 3, 8))
    assert tally["weight/positive"] == (0.75, 3) and tally["weight/negative"] == (0.25, 1)
    assert tally["soft_cap_share/positive"] == (3, 3) and tally["soft_cap_share/negative"] == (0, 1)
    assert tally["hard_mask_share/positive"] == (0, 3)
    assert tally["weight_distance"] == (3.0, 4)


def test_a_loss_without_gradient_masks_every_token_with_an_advantage_that_has_an_advantage():
    term = term_of("constant")
    assert term.loss.tolist() == [1] * 6 and term.weight.tolist() == [0] * 6
    assert term.masked.tolist() == [True] * 5 + [False] and term.capped.tolist() == [False] * 6


def test_figures_need_no_gradient():
    settings, tokens = options("weighted"), cases.as_tokens(three_responses())
    with torch.no_grad():
        loss, tally = cases.objective(tokens, settings, Totals(5, 3, 3, 8))
    assert loss.item() == pytest.approx((7 - 0.75) / 5, rel=1e-12) and tally["weight/positive"] == (0, 3)


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("number", "a float as loss"),
        ("total", "a tensor of shape [] as loss"),
        ("column", "a tensor of shape [6, 1] as loss"),
        ("term_of_a_number", "a NoneType as loss"),
        ("one_weight", "a tensor of shape [1] as weight"),
    ],
)
def test_anything_but_one_loss_for_each_token_is_refused(name, got):
    with pytest.raises(ValueError) as error:
        term_of(name)
    assert str(error.value) == f"{HERE}:{name} returned {got}, expected a value for each of 6 tokens"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raising", "KeyError: 'two\\nlines'"),
        ("exiting", "SystemExit: 0"),
        ("number", f"ValueError: {HERE}:number returned a float as loss, expected a value for each of 6 tokens"),
        ("not_a_number", "FloatingPointError: sample a: loss of response token 1 is inf"),
        ("stopped", "ValueError: the loss carries no gradient"),
    ],
)
def test_a_mistake_during_training_is_reported_in_one_line(name, message):
    tokens = replace(cases.as_tokens(three_responses()), names=("a", "b", "c"))
    with pytest.raises(UserError) as error:
        cases.objective(tokens, options(name), Totals(5, 3, 3, 8))
    cure = "correct it, and try it with megatron-aspo check-loss"
    assert str(error.value) == f"algorithm.policy_loss={HERE}:{name}: {message}; {cure}"


def test_a_gradient_that_is_not_the_policy_s_masks_every_token_with_an_advantage():
    term = term_of("elsewhere")
    # The last token has no advantage.
    assert not term.weight.any() and term.masked.tolist() == [True] * 5 + [False]


def test_a_group_without_advantage_needs_no_gradient():
    tokens = cases.as_tokens(three_responses())
    loss, _ = cases.objective(replace(tokens, advantages=torch.zeros_like(tokens.advantages)), options("stopped"), Totals(5, 3, 3, 8))
    assert float(loss.detach()) == 0


def test_a_loss_is_found_before_training_or_the_user_is_told_why_not():
    key = "algorithm.policy_loss"
    assert refusal(options("wieghted")) == (f"{key}={HERE}:wieghted: {HERE} ({user_losses.__file__}) has no wieghted; correct the name")
    assert refusal(options("not_a_function")) == f"{key}={HERE}:not_a_function is a int, expected a function"
    assert refusal(options("waiting")) == f"{key}={HERE}:waiting is an async function, expected a plain one; drop the async"
    assert refusal(AlgorithmOptions(policy_loss="weighted:")) == f"{key}=weighted: is not of the form package.module:function"
    assert refusal(AlgorithmOptions(policy_loss="no_such_module:f")) == (
        f"{key}=no_such_module:f: importing no_such_module raised ModuleNotFoundError: No module named 'no_such_module'; "
        "correct the path or the module"
    )


def test_a_loss_that_does_not_take_its_options_is_refused():
    assert refusal(options("weighted", weight=1.0, wait=2)) == (
        f"algorithm.policy_loss={HERE}:weighted cannot be called as (tokens, weight=…, wait=…) "
        "(got an unexpected keyword argument 'wait'); change its parameters"
    )
    assert refusal(options("constant", floor=1)) == (
        f"algorithm.policy_loss={HERE}:constant cannot be called as (tokens, floor=…) "
        "(got an unexpected keyword argument 'floor'); change its parameters"
    )
    assert callable(find_policy_loss(options("weighted", floor=0.0)))


def test_a_loss_sees_zeros_where_no_token_counts_and_the_entropy_classes_of_the_others():
    responses = three_responses()
    responses[0] = Response(**responses[0].__dict__ | {"entropy": np.array([0.5, 1.5, 1.0])})
    responses[1] = responses[1].map(lambda array: np.array([array[0], np.nan]))
    tokens, settings = cases.as_tokens(responses), options("keep")
    user_losses.seen.clear()
    cases.objective(tokens, settings, Totals(5, 3, 3, 8))
    (got,) = user_losses.seen
    for name in ("logprobs", "old_logprobs", "advantages", "entropy"):
        assert torch.equal(getattr(got, name), torch.where(tokens.mask, getattr(tokens, name), torch.zeros(6).double()))
    assert got.logprobs.requires_grad and not got.entropy.requires_grad
    assert torch.equal(got.mask, tokens.mask) and got.offsets == [0, 3, 5, 6]
    # 0.8-quantile of 0.5, 1, 1.5: 1.3. Of one value: itself.
    assert got.low_entropy[tokens.mask].tolist() == [True, False, True, True, True]
