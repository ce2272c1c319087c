"""Presets: sets of values under one name. Section → key → value."""

from typing import Any

Values = dict[str, dict[str, Any]]

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
