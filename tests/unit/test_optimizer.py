"""The learning rate by rollout step."""

from collections.abc import Iterable

import pytest

from megatron_aspo.trainer.options import OptimizerOptions


def rates(steps: Iterable[int], **options) -> list[float]:
    from megatron_aspo.trainer import megatron_adapter

    megatron_adapter.prepare()  # before any other import of Megatron-Core
    from megatron_aspo.trainer.optimizer import learning_rate

    return [learning_rate(OptimizerOptions(**options), step) for step in steps]


@pytest.mark.parametrize(
    ("from_zero", "shares"),
    [(False, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]), (True, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0])],
)
def test_the_warm_up_is_linear_from_a_fraction_or_from_zero(from_zero, shares):
    got = rates(range(6), lr=2e-6, warmup_steps=4, warmup_from_zero=from_zero)
    assert got == pytest.approx([2e-6 * share for share in shares], rel=1e-12, abs=0)


def test_the_recipe_warms_up_over_ten_rollout_steps_to_one_millionth():
    steps = (0, 4, 5, 9, 10, 1000)
    assert rates(steps) == pytest.approx([1e-7, 5e-7, 6e-7, 1e-6, 1e-6, 1e-6], rel=1e-12, abs=0)
    assert rates(steps, warmup_from_zero=True) == pytest.approx([0, 4e-7, 5e-7, 9e-7, 1e-6, 1e-6], rel=1e-12, abs=0)


def test_without_warm_up_the_rate_is_constant():
    assert rates(range(3), lr=3e-6, warmup_steps=0) == [3e-6] * 3
