"""From the rewards of a step's responses to advantages, by name. numpy float64; every token of a response carries its response's."""

from collections.abc import Callable

import numpy as np

from megatron_aspo.losses.options import AlgorithmOptions


def group_statistic(values: np.ndarray, groups: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[samples]: `function`, to which a common offset means nothing, of the values of each group, put back where they stood."""
    result = np.zeros(len(values))
    for group in np.unique(groups):
        chosen = values[groups == group]
        # Equal values become zeros, and their mean is exact.
        result[groups == group] = function(chosen - chosen[0])
    return result


def grpo(rewards: np.ndarray, groups: np.ndarray, counted: np.ndarray, options: AlgorithmOptions) -> np.ndarray:
    """(R − mean) / (std + 1e-6) over the group, std with n − 1 (arXiv 2402.03300); without `advantage_std`, R − mean."""

    def standard(values: np.ndarray) -> np.ndarray:
        deviation = values - values.mean()
        return deviation / (values.std(ddof=1) + 1e-6) if options.advantage_std else deviation

    return group_statistic(rewards, groups, standard)


def rloo(rewards: np.ndarray, groups: np.ndarray, counted: np.ndarray, options: AlgorithmOptions) -> np.ndarray:
    """R − mean of the rewards of the group's other responses (arXiv 2402.14740)."""
    return group_statistic(rewards, groups, lambda values: values - (values.sum() - values) / (len(values) - 1))


def reinforce_plus_plus(rewards: np.ndarray, groups: np.ndarray, counted: np.ndarray, options: AlgorithmOptions) -> np.ndarray:
    """R, or with `subtract_group_mean` R − mean of the group, whitened over all counted tokens of the step (arXiv 2501.03262).

    (R − mean) / (std + 1e-8) with each response weighted by its counted tokens, std over n.
    """
    if options.subtract_group_mean:
        rewards = group_statistic(rewards, groups, lambda values: values - values.mean())
    rewards = rewards - rewards[:1]  # a common offset ignored, as above
    tokens = max(counted.sum(), 1)
    deviation = rewards - (counted * rewards).sum() / tokens
    return deviation / (np.sqrt((counted * deviation**2).sum() / tokens) + 1e-8)


ADVANTAGES = {"grpo": grpo, "rloo": rloo, "reinforce_plus_plus": reinforce_plus_plus}


def advantages(rewards: np.ndarray, groups: np.ndarray, counted: np.ndarray, options: AlgorithmOptions) -> np.ndarray:
    """float64 [samples]. rewards: total reward R of each response; groups: its group's number; counted: its counted tokens."""
    return ADVANTAGES[options.advantage](rewards.astype(np.float64), groups, counted, options)
