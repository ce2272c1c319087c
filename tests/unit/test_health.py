"""Metrics of a step's rollouts."""

from dataclasses import replace

from megatron_aspo.data.records import VersionSpan
from megatron_aspo.observe.health import rollout_health, staleness
from tests.unit.test_batch import group


def test_staleness_is_averaged_over_tokens():
    one = group(0, [5], [[1, 2, 3], [4]])
    spans = (VersionSpan(2, 0, 1), VersionSpan(5, 1, 3)), (VersionSpan(4, 0, 1),)
    samples = tuple(replace(s, generation=replace(s.generation, versions=v)) for s, v in zip(one.samples, spans))
    assert staleness([replace(one, samples=samples)], 5) == (3 + 0 + 0 + 1) / 4


def test_raw_and_shaped_rewards_are_reported():
    """Rewards 0, 1, 2 and 0, 1; shaped 10, 11, 12 and 10, 11."""
    figures = rollout_health([group(0, [5], [[1], [2, 2], [3]]), group(1, [6], [[4, 4, 4], [5]])])
    assert (figures["reward/mean"], figures["reward/min"], figures["reward/max"]) == (0.8, 0, 2)
    assert figures["reward/shaped_mean"] == 10.8
    assert (figures["response/length_mean"], figures["response/length_max"]) == (1.6, 3)
    assert (figures["groups/total"], figures["groups/solved_by_all"], figures["groups/solved_by_none"]) == (2, 0, 0)
