"""Pending calls on several actors, here plain Ray tasks: how long the others are waited for once one has failed."""

import time

import pytest
import ray

from megatron_aspo.common.actors import ActorGroup, Pending

LATE_S = 8.0


@ray.remote(num_cpus=0)
def fail() -> None:
    raise ValueError("out of memory")


@ray.remote(num_cpus=0)
def answer(after_s: float) -> str:
    time.sleep(after_s)
    return "done"


def pending(**refs: ray.ObjectRef) -> Pending:
    explains = tuple((lambda error, name=name: RuntimeError(f"{name}: {error.cause}")) for name in refs)
    return Pending(tuple(refs), tuple(refs.values()), explains)


def test_after_the_first_failure_the_others_have_only_the_grace_period(ray_cluster):
    """Whatever the timeout is. The failure has its actor's message, and an actor that stays silent is named."""
    late = answer.remote(LATE_S)
    answers, failures = pending(one=answer.remote(0.0), two=fail.remote(), three=late).outcomes(60.0, 2.0)
    assert answers == {"one": "done"} and list(failures) == ["two", "three"]
    assert str(failures["two"]) == "two: out of memory"
    assert isinstance(failures["three"], TimeoutError) and "three did not answer in" in str(failures["three"])
    ray.cancel(late)


def test_without_a_failure_all_are_waited_for(ray_cluster):
    assert pending(one=answer.remote(0.0), two=answer.remote(1.0)).result() == ["done", "done"]


@ray.remote(num_cpus=0)
class Counter:
    def add(self, first: int, second: int) -> int:
        if first < 0:
            raise ValueError("negative")
        return first + second


def test_a_group_calls_its_actors_together_and_names_the_one_that_fails(ray_cluster):
    group = ActorGroup([(f"counter {n}", Counter.remote()) for n in range(3)], lambda name, error: RuntimeError(f"{name}: {error.cause}"))
    assert group.call("add", 1, 2).result() == [3, 3, 3]
    assert group.call_each("add", [(1, 1), (2, 2), (3, 3)]).result() == [2, 4, 6]
    assert group[1:].call("add", 0, 1).result() == [1, 1]
    with pytest.raises(RuntimeError, match="counter 1: negative"):
        group.call_each("add", [(1, 1), (-1, 1), (3, 3)]).result()
