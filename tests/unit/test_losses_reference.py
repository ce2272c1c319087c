"""The objective against the float64 reference: every policy loss, aggregation, correction and scope of the entropy quantile."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from megatron_aspo.losses.aggregation import Totals
from megatron_aspo.losses.options import AlgorithmOptions
from tests.reference.losses import Response
from tests.unit import loss_cases as cases

DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("loss", cases.LOSSES)
def test_log_ratios_beyond_20_do_not_overflow(loss):
    """Opened bounds let the bounded ratio through."""
    open_bounds = {"clip_low": 1.0, "clip_high": 1e12, "high_entropy_clip_low": 1.0, "high_entropy_clip_high": 1e12}
    wide = cases.algorithm(policy_loss=loss, dual_clip_neg=1e12, dual_clip_pos=1e12, kl_coef=0.0, **open_bounds)
    for dtype, difference, A in product(DTYPES, (19.5, 20.5, 300.0, -19.5, -20.5, -300.0), (1.0, -1.0)):
        old = np.full(1, -1.0)
        response = Response(old + difference, old, old, None, np.ones(1), np.ones(1, bool), A)
        cases.assert_objective_is_the_reference([response], wide, dtype, f"{loss} {difference} {A} {dtype}")
        ratio, _ = of_difference(wide, difference)
        assert ratio == pytest.approx(np.exp(np.clip(difference, -20, 20)), rel=1e-12)


def of_difference(options: AlgorithmOptions, difference: float) -> tuple[float, float]:
    """The logged ratio and its count, of one token of A = 1."""
    old = np.full(1, -1.0)
    response = Response(old + difference, old, old, None, np.ones(1), np.ones(1, bool), 1.0)
    return cases.objective(cases.as_tokens([response]), options, Totals(1, 1, 1, 1))[1]["ratio/positive"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aggregation", cases.AGGREGATIONS)
@pytest.mark.parametrize("loss", cases.LOSSES)
def test_objective_is_the_reference(loss, aggregation, dtype):
    responses = cases.one_of_each()
    if dtype == torch.float32:
        responses = cases.float32(responses)
    for correction, scope in product(cases.CORRECTIONS, cases.SCOPES):
        options = cases.algorithm(
            policy_loss=loss,
            aggregation=aggregation,
            rollout_correction=correction,
            entropy_quantile_scope=scope,
            kl_coef=0.1,
            high_entropy_kl_coef=0.25,
            entropy_coef=0.01,
        )
        cases.assert_objective_is_the_reference(responses, options, dtype, f"{correction} {scope}")


@pytest.mark.parametrize("aggregation", cases.AGGREGATIONS)
@pytest.mark.parametrize("loss", cases.LOSSES)
@cases.few(8)
@given(data=st.data())
def test_objective_is_the_reference_for_drawn_responses_and_options(loss, aggregation, data):
    responses = data.draw(cases.mini_batches())
    singles = cases.float32(data.draw(cases.mini_batches(extremes=False)))
    given_options = cases.options_of(policy_loss=loss, aggregation=aggregation)
    for correction, scope in product(cases.CORRECTIONS, cases.SCOPES):
        options = replace(data.draw(given_options), rollout_correction=correction, entropy_quantile_scope=scope)
        cases.assert_objective_is_the_reference(responses, options, torch.float64, f"{options}")
    cases.assert_objective_is_the_reference(singles, options, torch.float32, f"{options}")
