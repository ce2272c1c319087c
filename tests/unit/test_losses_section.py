"""Keys of the `algorithm` section that are options of the policy loss, beside the others or inside `policy_loss_options`."""

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.section import check_loss_options, gather_loss_options, lift_loss_options

INSIDE = "policy_loss_options"


@pytest.mark.parametrize(
    ("section", "lifted"),
    [
        ({INSIDE: {"clip_low": 0.1}, "kl_coef": 0.0}, {"kl_coef": 0.0, "clip_low": 0.1}),
        ({INSIDE: {"clip_low": 0.1, "mine": 1}}, {"clip_low": 0.1, INSIDE: {"mine": 1}}),
        ({INSIDE: {"mine": 1}}, {INSIDE: {"mine": 1}}),
        ({INSIDE: {}}, {INSIDE: {}}),
        ({INSIDE: "no mapping"}, {INSIDE: "no mapping"}),
    ],
)
def test_options_of_built_in_losses_are_moved_beside_the_others(section, lifted):
    assert lift_loss_options(section) == lifted


def test_an_option_in_both_places_is_refused_or_replaced():
    both = {INSIDE: {"clip_low": 0.1}, "clip_low": 0.3}
    with pytest.raises(UserError, match=r"algorithm\.clip_low and algorithm\.policy_loss_options\.clip_low are one option and both"):
        lift_loss_options(both)
    assert lift_loss_options(both, replace=True) == {"clip_low": 0.1}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"policy_loss": "reinforce", INSIDE: {"mine": 1}},
            "algorithm.policy_loss_options={'mine': 1} has no effect: it needs a policy loss",
        ),
        ({"policy_loss": "asbo", "strange": 1}, "unknown key algorithm.strange"),
        ({"policy_loss": "reinforce", "clip_low": None}, "algorithm.clip_low=None has no effect: it needs policy_loss aspo or"),
        # Dropped at its default, the first does not hide the second.
        ({"policy_loss": "reinforce", "clip_low": 0.2, "strange": 1}, "unknown key algorithm.strange"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(section, message):
    with pytest.raises(UserError, match=message):
        gather_loss_options(section, {})


@pytest.mark.parametrize(
    ("loss", "given", "message"),
    [
        ("reinforce", {"clip_low": 0.1}, "algorithm.clip_low=0.1 has no effect: it needs policy_loss aspo or ppo_clip or archer or gspo"),
        ("gspo", {"dual_clip_pos": 3.0}, "algorithm.dual_clip_pos=3.0 has no effect: it needs policy_loss aspo, not gspo; remove it"),
        ("gspo", {"mine": 1}, "algorithm.policy_loss_options={'mine': 1} has no effect: it needs a policy loss of your own; remove it"),
        ("gspo", {"clip_low": 1.5}, "algorithm.clip_low=1.5 must be at most 1"),
    ],
)
def test_options_of_another_loss_are_refused_where_no_recipe_was_read(loss, given, message):
    with pytest.raises(UserError) as refused:
        check_loss_options(AlgorithmOptions(policy_loss=loss, policy_loss_options=given))
    assert str(refused.value).startswith(message)
    check_loss_options(AlgorithmOptions(policy_loss="asbo", policy_loss_options=given))  # refused elsewhere


def test_an_option_of_other_losses_is_dropped_at_an_implied_value_only():
    section = {"policy_loss": "reinforce", "clip_low": 0.05, "kl_coef": 0.0}
    assert gather_loss_options(section, {"clip_low": 0.05}) == {"policy_loss": "reinforce", "kl_coef": 0.0, INSIDE: {}}
    with pytest.raises(UserError, match=r"algorithm\.clip_low=0\.05 has no effect"):
        gather_loss_options(section, {"clip_low": 0.06})
