"""Which options go together: both sides of every border, and every message in full."""

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest

from megatron_aspo.common.errors import UserError, nearest
from megatron_aspo.losses import registry
from megatron_aspo.losses.check import check_algorithm
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.section import algorithm_options, gather_loss_options, lift_loss_options

OWN = "my_losses:mine"
RECIPE = {
    "policy_loss": "aspo",
    "policy_loss_options": {},
    "low_entropy_quantile": 0.8,
    "entropy_quantile_scope": "response",
    "aggregation": "token_mean",
    "sequence_count": "counted",
    "advantage": "grpo",
    "advantage_std": True,
    "subtract_group_mean": False,
    "kl_coef": 0.001,
    "high_entropy_kl_coef": 0.0,
    "kl_estimator": "k3",
    "kl_in": "loss",
    "kl_value_clamp": 0.0,
    "entropy_coef": 0.0,
    "old_logprobs": "recompute",
    "rollout_correction": "none",
    "rollout_correction_cap": 2.0,
    "epochs": 3,
    "mini_batch_prompts": 16,
    "batch_order": "shuffled",
    "group_filter": "drop",
    "resample_rounds": 3,
    "overlong_buffer_tokens": 0,
    "overlong_factor": 1.0,
    "overlong_filter": False,
}


LOSS_OPTIONS = {
    "aspo": {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "high_entropy_clip_low": 0.4,
        "high_entropy_clip_high": 0.4,
        "dual_clip_neg": 3.0,
        "dual_clip_pos": 3.0,
    },
    "ppo_clip": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip_neg": 3.0},
    "archer": {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "high_entropy_clip_low": 0.4,
        "high_entropy_clip_high": 0.4,
        "dual_clip_neg": 3.0,
    },
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"clip_low": 1.0, "clip_high": 0.2},
    "reinforce": {},
    "no_is": {"clip_low": 0.2, "clip_high": 0.2},
}
"""Which options each built-in loss reads, with their defaults."""


def check(*, responses: int = 16, longest: int = 100, implied: dict[str, Any] | None = None, **given) -> None:
    """As a recipe with these keys in `algorithm` is checked."""
    check_algorithm(AlgorithmOptions(**gather_loss_options(lift_loss_options(given), implied or {})), responses, longest, implied)


def refusal(**given) -> str:
    with pytest.raises(UserError) as error:
        check(**given)
    return str(error.value)


def test_the_defaults_are_the_recipe_s():
    assert {field.name: getattr(AlgorithmOptions(), field.name) for field in fields(AlgorithmOptions)} == RECIPE
    assert AlgorithmOptions().policy_loss_options is not AlgorithmOptions().policy_loss_options
    check()


@pytest.mark.parametrize("loss", LOSS_OPTIONS)
def test_a_built_in_loss_gets_all_its_options_and_no_others(loss):
    assert algorithm_options(policy_loss=loss).policy_loss_options == LOSS_OPTIONS[loss]


def test_every_name_of_a_table_is_taken():
    for loss in ("aspo", "ppo_clip", "archer", "gspo", "cispo", "reinforce", "no_is", OWN):
        check(policy_loss=loss)
    for advantage in ("grpo", "rloo", "reinforce_plus_plus"):
        check(advantage=advantage, group_filter="none")
    for aggregation in ("seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"):
        for count in ("counted", "full_mini_batch"):
            check(aggregation=aggregation, sequence_count=count)
    for scope in ("response", "mini_batch"):
        check(entropy_quantile_scope=scope)
    for estimator in ("k2", "k3"):
        check(kl_estimator=estimator)
    for estimator in ("k1", "k2", "k3"):
        check(kl_estimator=estimator, kl_in="reward", group_filter="none")
    for old in ("recompute", "rollout"):
        check(old_logprobs=old)
    for correction in ("none", "tis", "mask"):
        check(rollout_correction=correction)
    for order in ("shuffled", "data_index"):
        check(batch_order=order)
    for group_filter in ("none", "drop", "resample", "drop_zero_or_one"):
        check(group_filter=group_filter)


@pytest.mark.parametrize(
    ("key", "value", "cure"),
    [
        ("advantage", "gropo", "did you mean grpo?"),
        ("advantage", "x", "valid: grpo, reinforce_plus_plus, rloo"),
        ("aggregation", "token_men", "did you mean token_mean?"),
        ("aggregation", "x", "valid: seq_mean_token_mean, seq_mean_token_sum, seq_mean_token_sum_norm, token_mean"),
        ("sequence_count", "x", "valid: counted, full_mini_batch"),
        ("entropy_quantile_scope", "x", "valid: mini_batch, response"),
        ("kl_estimator", "x", "valid: k1, k2, k3"),
        ("kl_in", "x", "valid: loss, reward"),
        ("old_logprobs", "x", "valid: recompute, rollout"),
        ("rollout_correction", "x", "valid: mask, none, tis"),
        ("batch_order", "x", "valid: data_index, shuffled"),
        ("group_filter", "x", "valid: drop, drop_zero_or_one, none, resample"),
        ("group_filter", "None", "did you mean none?"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_or_all_valid_ones(key, value, cure):
    assert refusal(**{key: value}) == f"algorithm.{key}={value} is not known; {cure}"


def test_an_unknown_policy_loss_is_refused_with_the_nearest_and_the_form_of_one_s_own():
    assert refusal(policy_loss="asbo") == (
        "algorithm.policy_loss=asbo is not known; did you mean aspo?; one of your own is package.module:function"
    )
    assert refusal(policy_loss="") == (
        f"algorithm.policy_loss= is not known; valid: {', '.join(sorted(registry.POLICY_LOSSES))}; "
        "one of your own is package.module:function"
    )


def test_the_nearest_name_is_given_with_its_prefix():
    assert nearest("claw", ["clip", "clay"]) == "did you mean clay?"
    assert nearest("claw", ["clip", "clay"], "a.") == "did you mean a.clay?"
    assert nearest("zzz", ["clip", "clay"], "a.") == "valid: a.clay, a.clip"
    assert nearest("abcd", ["abxy"]) == "did you mean abxy?"  # half of the letters
    assert nearest("abcd", ["axyz"]) == "valid: axyz"


@pytest.mark.parametrize("loss", ["aspo", "archer", OWN])
def test_losses_that_may_tell_entropy_classes_apart(loss):
    assert registry.declaration(loss).entropy_classes is True


@pytest.mark.parametrize("loss", ["ppo_clip", "gspo", "cispo", "reinforce", "no_is"])
def test_losses_that_do_not_read_entropy_classes(loss):
    assert registry.declaration(loss).entropy_classes is False


@pytest.mark.parametrize(
    ("key", "good", "bad", "rule"),
    [
        ("epochs", 1, 0, "must be greater than 0"),
        ("epochs", 1, -1, "must be greater than 0"),
        ("mini_batch_prompts", 1, 0, "must be greater than 0"),
        ("resample_rounds", 1, 0, "must be greater than 0"),
        ("overlong_factor", 0.5, 0.0, "must be greater than 0"),
        ("clip_low", 0.0, -0.1, "must not be negative"),
        ("clip_low", 1.0, 1.25, "must be at most 1: a ratio is positive"),
        ("clip_high", 0.0, -0.1, "must not be negative"),
        ("clip_high", 7.0, -2.0, "must not be negative"),
        ("high_entropy_clip_low", 0.0, -0.1, "must not be negative"),
        ("high_entropy_clip_low", 1.0, 1.25, "must be at most 1: a ratio is positive"),
        ("high_entropy_clip_high", 0.0, -0.1, "must not be negative"),
        ("high_entropy_clip_high", 5.0, -0.1, "must not be negative"),
        ("kl_coef", 0.0, -0.1, "must not be negative"),
        ("high_entropy_kl_coef", 0.5, -0.1, "must not be negative"),
        ("kl_value_clamp", 0.5, -0.1, "must not be negative"),
        ("entropy_coef", 0.5, -0.1, "must not be negative"),
        ("overlong_buffer_tokens", 1, -1, "must not be negative"),
        ("dual_clip_neg", 1.25, 1.0, "must be greater than 1, the weight on policy"),
        ("dual_clip_pos", 1.25, 1.0, "must be greater than 1, the weight on policy"),
        ("rollout_correction_cap", 1.25, 1.0, "must be greater than 1, the weight on policy"),
        ("low_entropy_quantile", 0.0, -0.25, "must be in [0, 1]"),
        ("low_entropy_quantile", 1.0, 1.25, "must be in [0, 1]"),
    ],
)
def test_a_number_out_of_its_range_is_refused(key, good, bad, rule):
    reader = {
        "high_entropy_kl_coef": {"policy_loss": "archer"},
        "resample_rounds": {"group_filter": "resample"},
        "overlong_factor": {"overlong_buffer_tokens": 16},
        "rollout_correction_cap": {"rollout_correction": "tis"},
    }.get(key, {})
    check(**reader | {key: good})
    assert refusal(**reader | {key: bad}) == f"algorithm.{key}={bad} {rule}"


NO_CLASSES = ("ppo_clip", "gspo", "cispo", "reinforce", "no_is")
CLASS_LOSSES = "aspo or archer"
CHANGED = {
    "clip_low": (0.3, "aspo or ppo_clip or archer or gspo or cispo or no_is", ("reinforce",)),
    "clip_high": (0.3, "aspo or ppo_clip or archer or gspo or cispo or no_is", ("reinforce",)),
    "high_entropy_clip_low": (0.3, CLASS_LOSSES, NO_CLASSES),
    "high_entropy_clip_high": (0.3, CLASS_LOSSES, NO_CLASSES),
    "low_entropy_quantile": (0.5, CLASS_LOSSES, NO_CLASSES),
    "entropy_quantile_scope": ("mini_batch", CLASS_LOSSES, NO_CLASSES),
    "dual_clip_neg": (2.0, "aspo or ppo_clip or archer", ("gspo", "cispo", "reinforce", "no_is")),
    "dual_clip_pos": (2.0, "aspo", ("ppo_clip", "archer", "gspo", "cispo", "reinforce", "no_is")),
    "high_entropy_kl_coef": (0.5, "archer", ("aspo", "ppo_clip", "gspo", "cispo", "reinforce", "no_is")),
}
"""An option of a policy loss → (a value of its own, the losses that read it, those that do not)."""


@pytest.mark.parametrize("key", CHANGED)
def test_an_option_that_the_policy_loss_does_not_read_is_refused(key):
    value, readers, others = CHANGED[key]
    for loss in readers.split(" or "):
        check(**{"policy_loss": loss, key: value})
    for loss in others:
        assert refusal(**{"policy_loss": loss, key: value}) == (
            f"algorithm.{key}={value} has no effect: it needs policy_loss {readers}, not {loss}; remove it"
        )
        check(**{"policy_loss": loss, key: value}, implied={key: value})
        assert refusal(**{"policy_loss": loss, key: value}, implied={key: 0.75, "epochs": value}).endswith("; remove it")


def test_a_loss_of_one_s_own_may_read_all_options_but_the_second_kl_weight():
    for key, (value, _, _) in CHANGED.items():
        if key != "high_entropy_kl_coef":
            check(**{"policy_loss": OWN, key: value})
    check(policy_loss=OWN, policy_loss_options={"a": 1})
    assert refusal(policy_loss=OWN, high_entropy_kl_coef=0.5) == (
        "algorithm.high_entropy_kl_coef=0.5 has no effect: it needs policy_loss=archer; remove it"
    )
    assert refusal(policy_loss_options={"a": 1}) == (
        "algorithm.policy_loss_options={'a': 1} has no effect: it needs a policy loss of your own; remove it"
    )


@pytest.mark.parametrize(
    ("key", "value", "needs", "unread", "read"),
    [
        ("sequence_count", "full_mini_batch", "a seq_mean aggregation", {}, {"aggregation": "seq_mean_token_sum"}),
        ("advantage_std", False, "advantage=grpo", {"advantage": "rloo"}, {}),
        ("advantage_std", False, "advantage=grpo", {"advantage": "reinforce_plus_plus", "group_filter": "none"}, {}),
        ("subtract_group_mean", True, "advantage=reinforce_plus_plus", {}, {"advantage": "reinforce_plus_plus"}),
        ("subtract_group_mean", True, "advantage=reinforce_plus_plus", {"advantage": "rloo"}, {"advantage": "reinforce_plus_plus"}),
        ("kl_estimator", "k2", "kl_coef above 0", {"kl_coef": 0.0}, {}),
        ("kl_in", "reward", "kl_coef above 0", {"kl_coef": 0.0, "group_filter": "none"}, {"group_filter": "none"}),
        ("kl_value_clamp", 10.0, "kl_coef above 0", {"kl_coef": 0.0}, {}),
        (
            "kl_value_clamp",
            10.0,
            "kl_coef above 0",
            {"kl_coef": 0.0, "policy_loss": "archer"},
            {"kl_coef": 0.0, "high_entropy_kl_coef": 0.1, "policy_loss": "archer"},
        ),
        ("rollout_correction_cap", 5.0, "rollout_correction=tis or mask", {}, {"rollout_correction": "tis"}),
        ("rollout_correction_cap", 5.0, "rollout_correction=tis or mask", {}, {"rollout_correction": "mask"}),
        ("resample_rounds", 5, "group_filter=resample", {}, {"group_filter": "resample"}),
        ("resample_rounds", 5, "group_filter=resample", {"group_filter": "none"}, {"group_filter": "resample"}),
        ("overlong_factor", 0.5, "overlong_buffer_tokens above 0", {}, {"overlong_buffer_tokens": 1}),
    ],
)
def test_an_option_that_nothing_reads_is_refused(key, value, needs, unread, read):
    assert refusal(**unread | {key: value}) == f"algorithm.{key}={value} has no effect: it needs {needs}; remove it"
    check(**read | {key: value})
    check(**unread | {key: value}, implied={key: value})
    assert refusal(**unread | {key: value}, implied={"clip_low": 0.2}) == refusal(**unread | {key: value})


def test_what_was_not_set_may_stand_at_its_default_beside_another_implied_value():
    """A recipe that sets an option back to the default of all losses, where the loss or the preset implies another."""
    check(policy_loss="reinforce", clip_low=0.2, implied={"clip_low": 0.3})
    assert refusal(policy_loss="reinforce", clip_low=0.4, implied={"clip_low": 0.3}) == (
        "algorithm.clip_low=0.4 has no effect: it needs policy_loss aspo or ppo_clip or archer or gspo or cispo or no_is, not reinforce; "
        "remove it"
    )


def test_k1_in_the_loss_is_refused_where_there_is_a_loss():
    assert refusal(kl_estimator="k1") == (
        "algorithm.kl_estimator=k1 in the loss has no useful gradient: its mean over samples is zero; take k2 or k3, or kl_in=reward"
    )
    check(kl_estimator="k1", kl_coef=0.0, implied={"kl_estimator": "k1"})


def test_archer_s_kl_weights_by_token_cannot_be_in_the_reward():
    assert refusal(policy_loss="archer", kl_in="reward") == (
        "algorithm.policy_loss=archer weights the KL term by token, which a reward cannot; set kl_in=loss"
    )


@pytest.mark.parametrize("correction", ["tis", "mask"])
def test_the_engine_s_own_log_probabilities_leave_nothing_to_correct(correction):
    assert refusal(old_logprobs="rollout", rollout_correction=correction) == (
        f"algorithm.rollout_correction={correction} corrects π_old against the engine, but old_logprobs=rollout takes the engine's own: "
        "there is nothing to correct; set one of them back"
    )


def test_the_overlong_buffer_is_at_most_the_longest_response():
    check(overlong_buffer_tokens=100, longest=100)
    assert refusal(overlong_buffer_tokens=101, longest=100) == (
        "algorithm.overlong_buffer_tokens=101 is more than rollout.max_response_tokens=100"
    )


def test_a_group_of_one_leaves_nothing_to_compare():
    alone = "rollout.responses_per_prompt=1 leaves nothing to compare within a group, but"
    cure = "take at least 2, or advantage=reinforce_plus_plus without the group mean"
    for advantage in ("grpo", "rloo"):
        assert refusal(responses=1, group_filter="none", advantage=advantage) == (
            f"{alone} algorithm.advantage={advantage} subtract_group_mean=False does so; {cure}"
        )
    assert refusal(responses=1, group_filter="none", advantage="reinforce_plus_plus", subtract_group_mean=True) == (
        f"{alone} algorithm.advantage=reinforce_plus_plus subtract_group_mean=True does so; {cure}"
    )
    check(responses=1, group_filter="none", advantage="reinforce_plus_plus")
    check(responses=2)


@pytest.mark.parametrize("group_filter", ["drop", "resample", "drop_zero_or_one"])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"advantage": "reinforce_plus_plus"}, "advantage=reinforce_plus_plus without subtract_group_mean"),
        ({"kl_in": "reward"}, "kl_in=reward"),
    ],
)
def test_groups_of_equal_rewards_are_not_left_out_where_they_carry_gradient(options, reason, group_filter):
    assert refusal(**options, group_filter=group_filter) == (
        f"algorithm.group_filter={group_filter} leaves out groups by their rewards alone, but with {reason} such groups carry gradient; "
        "set group_filter=none"
    )
    check(**options, group_filter="none")
    check(advantage="reinforce_plus_plus", subtract_group_mean=True, group_filter=group_filter)


def test_reinforce_has_no_ratio_for_the_old_policy_to_stand_in():
    assert refusal(policy_loss="reinforce", old_logprobs="rollout") == (
        "algorithm.old_logprobs=rollout has no effect: it needs a policy loss with a ratio, not reinforce; remove it"
    )
    check(policy_loss="cispo", old_logprobs="rollout")


def test_a_reference_policy_is_needed_where_a_kl_weight_is_above_zero():
    assert AlgorithmOptions(kl_coef=1e-9).has_kl and AlgorithmOptions(kl_coef=0.0, high_entropy_kl_coef=1e-9).has_kl
    assert not AlgorithmOptions(kl_coef=0.0).has_kl
    assert AlgorithmOptions(kl_coef=0.5, high_entropy_kl_coef=0.5).has_kl


def test_options_are_checked_without_importing_torch():
    code = "import sys, megatron_aspo.losses.check, megatron_aspo.losses.shaping; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
