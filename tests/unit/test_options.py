"""Options as records: refused where they are made, in one line that names the key; the same after a copy or a journey."""

import pickle
from dataclasses import FrozenInstanceError, field, replace
from typing import Annotated

import pytest
from pydantic import Field, ValidationError

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.options import Choice, Condition, NonNegative, Positive, Rule, build, first_changed, options
from megatron_aspo.common.recipe_values import with_overrides


@options("oven.rack")
class Rack:
    height: Positive[int] = 3


@options("oven")
class Oven:
    heat: Annotated[float, Field(gt=20, le=300), Rule("must be at most 300: paper burns", "le")] = 200.0
    minutes: NonNegative[int] = 10
    mode: Annotated[str, Choice("fan", "grill")] = "fan"
    level: Annotated[int, Choice(1, 2)] = 1
    even: Annotated[int, Condition(lambda value: value % 2 == 0, "must be even")] = 0
    dishes: list[str] = field(default_factory=list)
    rack: Rack = field(default_factory=Rack)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"heat": 20}, "oven.heat=20.0 must be greater than 20"),
        ({"heat": 301}, "oven.heat=301.0 must be at most 300: paper burns"),
        ({"heat": float("inf")}, "oven.heat=inf is not a finite number"),
        ({"minutes": -1}, "oven.minutes=-1 must not be negative"),
        ({"minutes": True}, "oven.minutes=True is not a whole number"),
        ({"mode": "gril"}, "oven.mode=gril is not known; did you mean grill?"),
        ({"mode": False}, "oven.mode=False is not text"),
        ({"level": 3}, "oven.level=3 is not known; it is 1 or 2"),
        ({"level": 1.0}, "oven.level=1.0 is not a whole number"),
        ({"even": 3}, "oven.even=3 must be even"),
        ({"dishes": ["a", 1]}, "oven.dishes=['a', 1] is not a list of texts"),
    ],
    ids=str,
)
def test_a_value_is_refused_with_its_key_where_options_are_made_built_or_replaced(given, message):
    for make in (lambda: Oven(**given), lambda: build(Oven, given), lambda: replace(Oven(), **given)):
        with pytest.raises(UserError) as refused:
            make()
        assert str(refused.value) == message


def test_values_of_yaml_are_read_as_the_types_of_the_fields():
    values = with_overrides({"rack": {"height": 4}}, ["heat=1e2", "dishes=2024-08-01", "rack.height=5"])
    assert build(Oven, values) == Oven(heat=100.0, dishes=["2024-08-01"], rack=Rack(5))
    assert build(Oven, {"dishes": ""}).dishes == [] and build(Oven, {"dishes": ["a"]}).dishes == ["a"]


def test_an_unknown_key_names_the_nearest_with_its_section():
    with pytest.raises(UserError, match=r"^unknown key oven\.rack\.hight; did you mean oven\.rack\.height\?$"):
        build(Oven, {"rack": {"hight": 1}})


def test_a_mistake_of_a_programmer_is_no_mistake_of_the_user():
    with pytest.raises(ValidationError):
        Oven(heet=1)


def test_options_are_frozen_compare_by_value_and_survive_a_journey():
    oven = Oven(heat=180, rack=Rack(2))
    assert pickle.loads(pickle.dumps(oven)) == oven != Oven()
    with pytest.raises(FrozenInstanceError):
        oven.heat = 1.0


def test_the_first_option_that_is_not_at_its_default_is_found():
    assert first_changed(Oven()) == "" and first_changed(Oven(minutes=3, level=2)) == "minutes"
    assert first_changed(Oven(minutes=3, level=2), ("level",)) == "level"


def test_overrides_leave_the_values_that_they_replace_untouched():
    shared = {"height": 4}
    values = {"rack": shared, "other": shared}
    assert with_overrides(values, ["rack.height=5"])["rack"] == {"height": 5}
    assert values == {"rack": {"height": 4}, "other": {"height": 4}}
