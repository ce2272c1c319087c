"""Shaping of rewards before they become advantages: the length penalty, and which groups are trained on."""

import numpy as np

from megatron_aspo.losses.options import AlgorithmOptions


def overlong_penalty(length: int, max_response_tokens: int, options: AlgorithmOptions) -> float:
    """min(0, −(L − (L_max − buffer)) / buffer) · factor for a response of `length` tokens (DAPO, arXiv 2503.14476); 0 without a buffer."""
    buffer = options.overlong_buffer_tokens
    return min(0.0, -(length - (max_response_tokens - buffer)) / buffer) * options.overlong_factor if buffer else 0.0


def is_trained_on(rewards: np.ndarray, group_filter: str) -> bool:
    """Whether a group with these shaped rewards [G] stays. `drop` and `resample` want rewards that differ; `drop_zero_or_one` refuses only
    all 0 and all 1; `none` refuses nothing.
    """
    if group_filter == "none":
        return True
    equal = bool(np.all(rewards == rewards[0]))
    return not equal or (group_filter == "drop_zero_or_one" and rewards[0] not in (0.0, 1.0))
