"""Metrics of a step's rollouts: rewards, lengths, repetition, groups."""

from collections.abc import Sequence

import numpy as np

from megatron_aspo.data.records import Group, Sample
from megatron_aspo.evaluation.repetition import repeated_ngrams


def rollout_health(groups: Sequence[Group]) -> dict[str, float]:
    """Return the metrics of everything that was generated, before any filter."""
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
        "reward/errors": sum(sample.failure == "error" for sample in samples),
        **reward_parts(samples),
        "response/length_mean": float(lengths.mean()),
        "response/length_max": int(lengths.max()),
        "response/cut_off_share": float(np.mean([sample.generation.finish_reason == "length" for sample in samples])),
        "response/repetition_share": float(np.mean([share for share, _ in repetition])),
        "response/repetition_top_count": max(top for _, top in repetition),
        "groups/total": len(groups),
        "groups/solved_by_all": sum(bool((group.rewards > 0).all()) for group in groups),
        "groups/solved_by_none": sum(bool((group.rewards <= 0).all()) for group in groups),
    }


def reward_parts(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the mean of each number in the `parts` of the reward's details, over the responses that have it: the unweighted scores of a
    mixed reward, or whatever a custom reward puts there."""
    scores: dict[str, list[float]] = {}
    for sample in samples:
        parts = sample.reward_details.get("parts")
        for name, score in parts.items() if isinstance(parts, dict) else ():
            if isinstance(score, int | float):
                scores.setdefault(name, []).append(score)
    return {f"reward/part/{name}": float(np.mean(values)) for name, values in sorted(scores.items())}


def staleness(groups: Sequence[Group], version: int) -> float:
    """Return the mean, over response tokens, of how many versions the weights that sampled them were behind `version`."""
    spans = [span for group in groups for sample in group.samples for span in sample.generation.versions]
    tokens = sum(span.stop - span.start for span in spans)
    return sum((version - span.version) * (span.stop - span.start) for span in spans) / tokens
