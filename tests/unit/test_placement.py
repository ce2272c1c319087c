"""Which side has the devices when: the order of calls, and the sharing. A whole colocated run is in tests/e2e/test_placement.py."""

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.rollout.engine import EngineError
from megatron_aspo.rollout.engine_layout import EngineSizes
from megatron_aspo.runtime.placement import Colocated, Split, check_placement, shared_locations


class Recorder:
    """Records every call of any method; `publish` returns how many bytes it sent. A call in `failing` raises the first time."""

    version = 5

    def __init__(self, name: str, calls: list[tuple], failing: list[tuple] = ()):
        self._name, self._calls, self._failing = name, calls, failing

    def __getattr__(self, method: str):
        def call(*arguments, **options):
            words = (f"{self._name}.{method}", *arguments, *(name for name, value in options.items() if value))
            self._calls.append(words)
            if words in self._failing:
                self._failing.remove(words)
                raise EngineError("engine 0 died")
            return 7

        return call


def colocated(sleep_level: int, *failing: tuple) -> tuple[Colocated, list[tuple]]:
    calls: list[tuple] = []
    left = list(failing)
    sides = [Recorder(name, calls, left) for name in ("trainers", "engines", "publisher")]
    return Colocated(*sides, sleep_level), calls


@pytest.mark.parametrize("sleep_level", [1, 2])
def test_on_shared_devices_each_side_frees_memory_before_the_other_allocates(sleep_level):
    placement, calls = colocated(sleep_level)
    placement.to_training()
    assert calls == [("engines.sleep", sleep_level), ("trainers.reload",)]
    calls.clear()
    assert placement.to_generating(3, changed=True) == 7
    assert calls == [
        ("trainers.offload", "optimizer"),
        ("engines.wake", ("weights",)),
        ("publisher.publish", 3),
        ("trainers.offload", "weights"),
        ("engines.wake", ("kv_cache",)),
    ]


def test_engines_that_discard_their_weights_are_sent_them_even_if_unchanged():
    for sleep_level, sent in ((1, 0), (2, 7)):
        placement, calls = colocated(sleep_level)
        placement.to_training()
        assert placement.to_generating(3, changed=False) == sent
        assert (("publisher.publish", 3) in calls) == bool(sent)


def test_a_switch_to_the_side_that_has_the_devices_is_a_no_op():
    placement, calls = colocated(2)
    assert placement.to_generating(0, changed=False) == 0  # the initial state
    assert calls == []
    placement.to_training()
    placement.to_training()
    assert [name for name, *_ in calls] == ["engines.sleep", "trainers.reload"]


def test_on_separate_devices_only_changed_weights_are_sent():
    calls: list[tuple] = []
    placement = Split(Recorder("publisher", calls))
    placement.to_training()
    assert (placement.to_generating(1, changed=True), placement.to_generating(1, changed=False)) == (7, 0)
    assert calls == [("publisher.publish", 1)]


def test_lost_engines_on_separate_devices_are_replaced_and_sent_the_current_weights():
    calls: list[tuple] = []
    publisher = Recorder("publisher", calls)
    placement = Split(publisher)
    placement.restore("engine 0 died")
    assert calls == [("publisher.log", "engine 0 died"), ("publisher.replace_dead",), ("publisher.publish", 5, "verify")]
    calls.clear()
    publisher.version = 0  # the initial version of every engine
    placement.restore("engine 0 died")
    assert calls[-1] == ("publisher.replace_dead",)


@pytest.mark.parametrize("sleep_level", [1, 2])
def test_an_engine_lost_while_falling_asleep_is_replaced_before_the_ranks_reload_and_then_sent_weights(sleep_level):
    placement, calls = colocated(sleep_level, ("engines.sleep", sleep_level))
    placement.to_training()
    replaced = [("engines.sleep", sleep_level), ("publisher.log", "engine 0 died"), ("publisher.replace_dead",)]
    assert calls == [*replaced, ("engines.sleep", sleep_level), ("trainers.reload",)]
    assert placement.to_generating(5, changed=False) == 7  # its weights come from the model's directory
    assert ("publisher.publish", 5, "verify") in calls
    placement.to_training()
    assert placement.to_generating(5, changed=False) == (7 if sleep_level == 2 else 0)


@pytest.mark.parametrize("tag", ["weights", "kv_cache"])
def test_an_engine_lost_while_waking_is_replaced_and_sent_the_weights(tag):
    placement, calls = colocated(2, ("engines.wake", (tag,)))
    placement.to_training()
    placement.to_generating(5, changed=True)
    assert ("publisher.replace_dead",) in calls and ("publisher.publish", 5, "verify") in calls
    assert calls[-1] == ("engines.wake", ("kv_cache",))
    # The engines have the devices at the end.
    assert [name for name, *_ in calls if name.startswith("trainers")][-1] == "trainers.offload"


@pytest.mark.parametrize("call", [("engines.sleep", 2), ("engines.wake", ("weights",)), ("engines.wake", ("kv_cache",))], ids=str)
def test_engines_lost_one_after_another_are_replaced_three_times_and_then_it_is_an_error(call):
    def change_sides(losses: int) -> list[tuple]:
        placement, calls = colocated(2, *[call] * losses)
        placement.to_training()
        placement.to_generating(5, changed=True)
        return calls

    calls = change_sides(3)
    assert calls.count(("publisher.replace_dead",)) == 3 and calls[-1] == ("engines.wake", ("kv_cache",))
    with pytest.raises(EngineError, match="engine 0 died"):
        change_sides(4)


RANKS = [("a", "0"), ("a", "1"), ("a", "2"), ("b", "0")]


def test_engines_share_the_devices_of_the_ranks_in_order():
    assert shared_locations(RANKS, EngineSizes(1, engines=3)) == [("a", "0"), ("a", "1"), ("a", "2")]
    assert shared_locations(RANKS, EngineSizes(2)) == [("a", "0,1")]
    assert shared_locations([("a", ""), ("a", "")], EngineSizes(2)) == [("a", "")]  # on CPU


def test_an_engine_that_would_span_two_nodes_is_refused():
    with pytest.raises(UserError, match=r"engine 1 would share the devices of training ranks 2 to 3, which live on several nodes"):
        shared_locations(RANKS, EngineSizes(2, engines=2))


def test_more_engines_than_there_are_devices_to_share_are_refused():
    check_placement("colocated", 4, EngineSizes(2, engines=2))
    check_placement("split", 1, EngineSizes(2, engines=2))
    with pytest.raises(UserError, match=r"2 engines of 2 devices need 4 training ranks to share them with, there are 3"):
        check_placement("colocated", 3, EngineSizes(2, engines=2))
