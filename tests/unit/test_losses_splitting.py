"""Any cut of a mini-batch into micro-batches and data-parallel shares gives the gradient of the whole, which the reference tells."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, strategies as st

from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.tally import add_tallies
from tests.reference.losses import Response
from tests.unit import loss_cases as cases

OPTIONS = {"kl_coef": 0.1, "high_entropy_kl_coef": 0.25, "entropy_coef": 0.01, "rollout_correction": "tis", "kl_value_clamp": 1.5}


def assert_cuts_add_up(responses: list[Response], micro_batches: list[list[int]], options: AlgorithmOptions) -> None:
    """Each micro-batch adds its gradient to that of the same leaves, as micro-batches and ranks do to a parameter's."""
    tokens, totals, want = cases.as_tokens(responses), cases.totals(responses, options), cases.truth(responses, options)
    shares, tallies = [], []
    for chosen in micro_batches:
        loss, tally = cases.objective(cases.cut(tokens, chosen), options, totals)
        loss.backward()
        shares.append(loss.detach())
        tallies.append(tally)
    what = f"{micro_batches} {options}"
    cases.assert_agree(sum(shares), tokens.logprobs.grad, tokens.entropy.grad, want, torch.float64, what)
    cases.assert_tally_is_the_reference(add_tallies(*tallies), want, tokens.ref_logprobs is not None, what)


CUTS = [
    [[0, 1, 2, 3, 4, 5, 6, 7, 8]],
    [[i] for i in range(9)],
    [[8, 0, 3], [5, 1], [], [2, 7, 4, 6]],  # one of two ranks has an empty micro-batch
    [[4, 6, 7], [], [0, 1, 2], [3, 5, 8]],  # in 4, 6 and 7, of 0, 1 and 6 tokens, none counts
]


@pytest.mark.parametrize("aggregation", cases.AGGREGATIONS)
@pytest.mark.parametrize("loss", cases.LOSSES)
def test_gradient_loss_and_figures_do_not_depend_on_the_cut(loss, aggregation):
    for micro_batches, (count, scope) in zip(CUTS, product(("counted", "full_mini_batch"), cases.SCOPES)):
        given = {"policy_loss": loss, "aggregation": aggregation, "sequence_count": count, "entropy_quantile_scope": scope}
        options = cases.algorithm(**OPTIONS, **given)
        assert_cuts_add_up(cases.one_of_each(7), micro_batches, options)


@pytest.mark.parametrize("aggregation", cases.AGGREGATIONS)
@pytest.mark.parametrize("loss", cases.LOSSES)
@cases.few(8)
@given(data=st.data())
def test_gradient_loss_and_figures_do_not_depend_on_drawn_cuts(loss, aggregation, data):
    responses = data.draw(cases.mini_batches(most=9))
    parts = data.draw(st.integers(1, 5))
    places = [data.draw(st.integers(0, parts - 1)) for _ in responses]
    order = data.draw(st.permutations(range(len(responses))))
    micro_batches = [[i for i in order if places[i] == part] for part in range(parts)]
    options = data.draw(cases.options_of(policy_loss=loss, aggregation=aggregation))
    options = replace(options, rollout_correction=data.draw(st.sampled_from(cases.CORRECTIONS)))
    for scope in cases.SCOPES:
        assert_cuts_add_up(responses, micro_batches, replace(options, entropy_quantile_scope=scope))
