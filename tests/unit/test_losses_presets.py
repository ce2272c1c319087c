"""Names, presets, and what `archer_reference` computes, by hand."""

from dataclasses import asdict
from math import exp
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.options import Choice, option_fields
from megatron_aspo.config import Config, load_config
from megatron_aspo.losses.advantages import ADVANTAGES
from megatron_aspo.losses.aggregation import Totals
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.presets import PRESETS
from megatron_aspo.losses.registry import POLICY_LOSSES, own_defaults
from megatron_aspo.losses.shaping import is_trained_on
from tests.reference.losses import POLICY, Response
from tests.unit import loss_cases as cases

TABLE = {
    "algorithm.aggregation": ("token_mean", "seq_mean_token_mean"),
    "algorithm.sequence_count": ("counted", "full_mini_batch"),
    "algorithm.kl_value_clamp": (0.0, 10.0),
    "algorithm.group_filter": ("drop", "drop_zero_or_one"),
    "algorithm.batch_order": ("shuffled", "data_index"),
    "optimizer.warmup_from_zero": (False, True),
    "optimizer.decay_one_dimensional": (False, True),
}
"""Where `paper` and `archer_reference` differ."""
FIXED_ALIKE = {
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.2,
    "algorithm.high_entropy_clip_low": 0.4,
    "algorithm.high_entropy_clip_high": 0.4,
}
"""Fixed by `archer_reference`, and the default of `paper`."""


@pytest.fixture
def load(tmp_path: Path):
    def load(*overrides: str, **values) -> Config:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({"model": "m", "task": "largest_of_three"} | values))
        return load_config(recipe, overrides)

    return load


def test_names_that_a_configuration_may_use_are_the_tables_keys():
    assert list(POLICY_LOSSES) == list(POLICY)
    assert {name: path.rpartition(":")[2] for name, path in POLICY_LOSSES.items()} == {name: name for name in POLICY}
    marks = ((name, mark) for name, field in option_fields(AlgorithmOptions).items() for mark in field.metadata)
    choices = {name: mark.values for name, mark in marks if isinstance(mark, Choice)}
    assert tuple(ADVANTAGES) == choices["advantage"]
    assert choices == {
        "advantage": ("grpo", "rloo", "reinforce_plus_plus"),
        "aggregation": tuple(cases.AGGREGATIONS),
        "sequence_count": ("counted", "full_mini_batch"),
        "entropy_quantile_scope": tuple(cases.SCOPES),
        "kl_estimator": ("k1", "k2", "k3"),
        "kl_in": ("loss", "reward"),
        "old_logprobs": ("recompute", "rollout"),
        "rollout_correction": tuple(cases.CORRECTIONS),
        "batch_order": ("shuffled", "data_index"),
        "group_filter": ("none", "drop", "resample", "drop_zero_or_one"),
    }


def test_archer_reference_differs_from_paper_exactly_where_the_table_says(load):
    paper, archer = (dict(cases.flat(asdict(load(preset=preset)))) for preset in ("paper", "archer_reference"))
    assert paper.keys() == archer.keys()
    assert {key: (paper[key], archer[key]) for key in paper if paper[key] != archer[key]} == TABLE | {
        "preset": ("paper", "archer_reference")
    }
    assert {key: archer[key.replace("algorithm.", "algorithm.policy_loss_options.")] for key in FIXED_ALIKE} == FIXED_ALIKE


def test_paper_is_the_default(load):
    assert load() == load(preset="paper")
    assert PRESETS["paper"] == {} and load().algorithm == cases.algorithm()


def test_archer_reference_fixes_what_it_sets_and_nothing_else(load):
    fixed = {key: value for key, (_, value) in TABLE.items()} | FIXED_ALIKE
    assert dict(cases.flat(PRESETS["archer_reference"])) == fixed
    other = {key: value for key, (value, _) in TABLE.items()} | dict.fromkeys(FIXED_ALIKE, 0.3)
    for key, value in other.items():
        with pytest.raises(UserError) as error:
            load(f"{key}={value}", preset="archer_reference")
        assert str(error.value) == (f"preset=archer_reference fixes {key}={fixed[key]}, not {value}; remove the key, or set preset=paper")
        load(f"{key}={fixed[key]}", preset="archer_reference")
    assert load("algorithm.dual_clip_neg=2.0", preset="archer_reference").algorithm.policy_loss_options["dual_clip_neg"] == 2


def test_a_preset_s_values_may_stand_without_effect(load):
    """kl_value_clamp without KL."""
    assert load("algorithm.kl_coef=0.0", preset="archer_reference").algorithm.kl_value_clamp == 10


def test_gspo_and_cispo_bring_bounds_and_aggregation_of_their_own(load):
    gspo, cispo = (load(f"algorithm.policy_loss={loss}").algorithm for loss in ("gspo", "cispo"))
    assert (gspo.policy_loss_options, gspo.aggregation) == ({"clip_low": 3e-4, "clip_high": 4e-4}, "seq_mean_token_mean")
    assert (cispo.policy_loss_options, cispo.aggregation) == ({"clip_low": 1.0, "clip_high": 0.2}, "token_mean")
    assert {loss: own_defaults(loss) for loss in POLICY_LOSSES if own_defaults(loss)} == {
        "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "seq_mean_token_mean"},
        "cispo": {"clip_low": 1.0},
    }
    own = load("algorithm.policy_loss=gspo", "algorithm.clip_low=0.1", "algorithm.aggregation=token_mean").algorithm
    assert (own.policy_loss_options, own.aggregation) == ({"clip_low": 0.1, "clip_high": 4e-4}, "token_mean")


def test_archer_reference_drops_groups_that_are_all_zero_or_all_one(load):
    paper, archer = (load(preset=preset).algorithm.group_filter for preset in ("paper", "archer_reference"))
    for rewards, by_paper, by_archer in (
        ([0.0, 0.0], False, False),
        ([1.0, 1.0], False, False),
        ([-0.5, -0.5], False, True),
        ([0.0, 1.0], True, True),
    ):
        assert is_trained_on(np.array(rewards), paper) is by_paper
        assert is_trained_on(np.array(rewards), archer) is by_archer


def five_of_six_responses() -> list[Response]:
    """Of a mini-batch of 2 prompts × 3 responses: one was filtered, and of the fourth no token counts. Given as r and x = ref − logp."""
    given = [
        # A, r, x, entropy, mask
        (1.0, [0.5, 1.25, 0.25, 1.1, 1.3], [np.log(2), 0, 3, np.log(0.5), 2.6], [0.1, 0.2, 0.3, 0.4, 0.9], [1, 1, 1, 1, 1]),
        (-1.5, [0.7, 4.0, 9.9, 0.7], [-1, -10.5, 9.9, -11.5], [1, 2, 9, 3], [1, 1, 0, 1]),
        (0.5, [1.0], [0], [0.7], [1]),
        (-1.0, [2.0, 2.0], [1, 1], [1, 1], [0, 0]),
        (-1.0, [1.3, 0.5], [0, -30], [2, 1], [1, 1]),
    ]
    result = []
    for A, r, x, H, mask in given:
        old = np.full(len(r), -4.0)
        logp = old + np.log(r)
        result.append(Response(logp, old, old, logp + np.array(x), np.array(H, float), np.array(mask, bool), A))
    return result


def gradient(options: AlgorithmOptions) -> tuple[float, list[float]]:
    tokens = cases.as_tokens(five_of_six_responses())
    loss, _ = cases.objective(tokens, options, Totals(tokens=11, responses=4, full_responses=2 * 3, max_response_tokens=100))
    loss.backward()
    return loss.item(), tokens.logprobs.grad.tolist()


def test_archer_reference_has_the_gradients_worked_out_by_hand(load):
    """ASPO with β = 0.001: (−A·w − β(eˣ − 1)) / tokens of the response / 6, without β's part where eˣ − x − 1 > 10."""
    config = load(preset="archer_reference", algorithm={"mini_batch_prompts": 2}, rollout={"responses_per_prompt": 3})
    loss, got = gradient(config.algorithm)
    assert got == pytest.approx(
        [
            # A = 1. Low-entropy up to the 0.8-quantile 0.4 + 0.2 · 0.5 = 0.5.
            (-1 / 0.5 - 0.001 * (2 - 1)) / 5 / 6,  # a lagging token: the inverted ratio
            0.0,  # r > 1.2 and x = 0
            (-3.0) / 5 / 6,  # 1/r = 4, capped; e³ − 4 > 10
            (-1 / 1.1 - 0.001 * (0.5 - 1)) / 5 / 6,
            (-1 / 1.3 - 0.001 * (exp(2.6) - 1)) / 5 / 6,  # r < 1.4, high entropy; e^2.6 − 3.6 = 9.86
            # A = −1.5. The third token does not count; 0.8-quantile 2 + 0.6 · 1 = 2.6.
            (-0.001 * (exp(-1) - 1)) / 3 / 6,  # r < 0.8
            (1.5 * 3.0 - 0.001 * (exp(-10.5) - 1)) / 3 / 6,  # r = 4, capped; 10.5 − 1 < 10
            0.0,
            (1.5 * 0.7) / 3 / 6,  # r > 0.6, high entropy; 11.5 − 1 > 10
            # A = 0.5, on policy, at the reference.
            -0.5 / 1 / 6,
            0.0,
            0.0,
            # A = −1. 0.8-quantile of 2 and 1: 1.8.
            (1.0 * 1.3) / 2 / 6,
            0.0,  # r < 0.8; 30 − 1 > 10
        ],
        rel=1e-12,
        abs=0,
    )
    policy = (-2 - 1 / 1.2 - 3 - 1 / 1.1 - 1 / 1.3) / 5 + 1.5 * (0.8 + 3 + 0.7) / 3 - 0.5 + (1.3 + 0.8) / 2
    first = (2 - np.log(2) - 1) + 0 + 10 + (0.5 + np.log(2) - 1) + (exp(2.6) - 3.6)
    kl = first / 5 + ((exp(-1) + 1 - 1) + (exp(-10.5) + 10.5 - 1) + 10) / 3 + 0 + (0 + 10) / 2
    assert loss == pytest.approx((policy + 0.001 * kl) / 6, rel=1e-12)


def test_paper_has_the_gradients_worked_out_by_hand(load):
    """The same responses: (−A·w − β(eˣ − 1)) / 11 counted tokens of the mini-batch, x bounded to ±20 and KL to nothing."""
    _, got = gradient(load(algorithm={"mini_batch_prompts": 2}, rollout={"responses_per_prompt": 3}).algorithm)
    assert got == pytest.approx(
        [
            (-1 / 0.5 - 0.001 * (2 - 1)) / 11,
            0.0,
            (-3.0 - 0.001 * (exp(3) - 1)) / 11,
            (-1 / 1.1 - 0.001 * (0.5 - 1)) / 11,
            (-1 / 1.3 - 0.001 * (exp(2.6) - 1)) / 11,
            (-0.001 * (exp(-1) - 1)) / 11,
            (1.5 * 3.0 - 0.001 * (exp(-10.5) - 1)) / 11,
            0.0,
            (1.5 * 0.7 - 0.001 * (exp(-11.5) - 1)) / 11,
            -0.5 / 11,
            0.0,
            0.0,
            (1.0 * 1.3) / 11,
            0.0,  # r < 0.8; x = −30 is beyond −20
        ],
        rel=1e-12,
        abs=0,
    )
