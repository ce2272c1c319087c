"""From the rewards of groups to advantages: estimators by name, and which groups are trained on."""

from collections.abc import Callable, Sequence

import numpy as np

from megatron_aspo.data.records import Group


def grpo(rewards: np.ndarray) -> np.ndarray:
    """(R − mean) / (std + 1e-6) over a group, std with n − 1. float64 [G] → float64 [G]; G must be at least 2."""
    if rewards.size < 2:
        raise ValueError(f"a group of {rewards.size} has no standard deviation; at least 2 responses are needed")
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)


ADVANTAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"grpo": grpo}


def group_advantages(groups: Sequence[Group], name: str) -> list[np.ndarray]:
    """Per group, float64 [G]."""
    return [ADVANTAGES[name](group.rewards) for group in groups]


def kept_groups(groups: Sequence[Group], group_filter: str) -> list[Group]:
    """The groups to train on. `drop` leaves out those whose rewards are all equal: they carry no gradient of the policy loss."""
    if group_filter == "drop":
        return [group for group in groups if np.ptp(group.rewards) > 0]
    return list(groups)
