"""Options of the trainer that are words, and element types that do not go together."""

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.trainer.options import TrainerOptions, check_trainer

CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "layer_spec": ("auto", "local", "transformer_engine"),
    "gradient_dtype": ("float32", "bfloat16"),
    "fp8": ("none", "e4m3", "hybrid"),
    "recompute": ("none", "selective", "full"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_word_is_refused_with_the_cure(name):
    with pytest.raises(UserError, match=rf"trainer.{name}=wrong is not known; valid: ") as caught:
        TrainerOptions(**{name: "wrong"})
    assert all(choice in str(caught.value) for choice in CHOICES[name]) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "choice"), [(name, choice) for name, choices in CHOICES.items() for choice in choices])
def test_every_known_word_is_accepted(name, choice):
    assert getattr(TrainerOptions(**{name: choice}), name) == choice


def test_a_mistyped_word_names_the_nearest():
    with pytest.raises(UserError, match=r"trainer.recompute=selectiv is not known; did you mean selective\?"):
        TrainerOptions(recompute="selectiv")


@pytest.mark.parametrize("option", [{"gradient_dtype": "bfloat16"}, {"fp8": "e4m3"}, {"fp8": "hybrid"}], ids=str)
def test_less_precise_gradients_or_products_than_a_float32_model_are_refused(option):
    ((name, value),) = option.items()
    with pytest.raises(UserError, match=rf"trainer.{name}={value} .* trainer.dtype=.*; set ") as caught:
        check_trainer(TrainerOptions(dtype="float32", **option))
    assert "\n" not in str(caught.value)
    check_trainer(TrainerOptions(dtype="bfloat16", **option))
