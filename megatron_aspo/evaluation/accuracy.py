"""Held-out accuracy with its standard error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_aspo.data.records import Group


@dataclass(frozen=True)
class Accuracy:
    mean: float
    """Mean reward over all draws of all prompts."""
    standard_error: float
    """Over prompts: draws of one prompt are not independent questions."""
    prompts: int
    draws: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f}"


def accuracy(groups: Sequence[Group]) -> Accuracy:
    """Of the groups' rewards; every group has the same number of draws, and there are at least 2 groups."""
    means = np.array([group.rewards.mean() for group in groups])
    return Accuracy(
        mean=float(means.mean()),
        standard_error=float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan,
        prompts=len(groups),
        draws=len(groups[0].samples),
    )
