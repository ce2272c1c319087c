"""Sets of values under one name: what a policy loss brings along, and what a preset fixes. Section → key → value."""

from typing import Any

Values = dict[str, dict[str, Any]]

LOSS_DEFAULTS: dict[str, Values] = {
    "gspo": {"algorithm": {"clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "seq_mean_token_mean"}},
    "cispo": {"algorithm": {"clip_low": 1.0}},
}
"""Defaults of a policy loss that are not those of the others; a recipe may set other values."""

PRESETS: dict[str, Values] = {
    "paper": {},
    "archer_reference": {
        "algorithm": {
            "aggregation": "seq_mean_token_mean",
            "sequence_count": "full_mini_batch",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "high_entropy_clip_low": 0.4,
            "high_entropy_clip_high": 0.4,
            "kl_value_clamp": 10.0,
            "group_filter": "drop_zero_or_one",
            "batch_order": "data_index",
        },
        "optimizer": {"warmup_from_zero": True, "decay_one_dimensional": True},
    },
}
"""`paper` is the defaults: what the ASPO paper says, with one mean over the mini-batch. `archer_reference` is what its authors'
public code does instead; a recipe that sets one of these keys otherwise is refused."""
