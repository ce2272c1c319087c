"""Health figures of a step's rollouts: rewards, lengths, repetition, groups."""

from collections.abc import Sequence

import numpy as np

from megatron_aspo.data.records import Group
from megatron_aspo.evaluation.repetition import repeated_ngrams


def rollout_health(groups: Sequence[Group]) -> dict[str, float]:
    """Figures of everything that was generated, before any filter."""
    samples = [sample for group in groups for sample in group.samples]
    rewards = np.concatenate([group.rewards for group in groups])
    lengths = np.array([len(sample.generation.token_ids) for sample in samples])
    repetition = [repeated_ngrams(sample.text) for sample in samples]
    return {
        "reward/mean": float(rewards.mean()),
        "reward/max": float(rewards.max()),
        "reward/shaped_mean": float(np.mean([sample.shaped_reward for sample in samples])),
        "reward/min": float(rewards.min()),
        "reward/timeouts": sum(sample.failure == "timeout" for sample in samples),
        "reward/crashes": sum(sample.failure == "crash" for sample in samples),
        "response/length_mean": float(lengths.mean()),
        "response/length_max": int(lengths.max()),
        "response/cut_off_share": float(np.mean([sample.generation.finish_reason == "length" for sample in samples])),
        "response/repetition_share": float(np.mean([share for share, _ in repetition])),
        "response/repetition_top_count": max(top for _, top in repetition),
        "groups/total": len(groups),
        "groups/solved_by_all": sum(bool((group.rewards > 0).all()) for group in groups),
        "groups/solved_by_none": sum(bool((group.rewards <= 0).all()) for group in groups),
    }


def staleness(groups: Sequence[Group], version: int) -> float:
    """Mean over response tokens of how many versions older than `version` the weights were that sampled them."""
    spans = [span for group in groups for sample in group.samples for span in sample.generation.versions]
    tokens = sum(span.stop - span.start for span in spans)
    return sum((version - span.version) * (span.stop - span.start) for span in spans) / tokens
