"""When transfers are verified, what both ends are given, and what happens when one fails. The ends: test_exchange.py, test_sync.py."""

from dataclasses import dataclass, field

import pytest

from megatron_aspo.runtime.publisher import Publisher, PublishError


@dataclass(frozen=True)
class Ended:
    """Finished calls."""

    names: tuple[str, ...]
    failures: dict[str, Exception] = field(default_factory=dict)
    answers: dict[str, object] = field(default_factory=dict)

    def __add__(self, other: "Ended") -> "Ended":
        return Ended(self.names + other.names, self.failures | other.failures, self.answers | other.answers)

    def outcomes(self, timeout_s: float, grace_s: float):
        return self.answers, self.failures


class Ends:
    """Trainers and engines that record their calls, and fail as specified."""

    def __init__(self, *failures: dict[str, Exception], dead: list[str] = ()):
        """failures: of one transfer after another; dead: names of dead engines."""
        self.failures, self.dead = list(failures), list(dead)
        self.unmet: list[dict[str, Exception]] = []
        """Failures to form the group, one attempt after another."""
        self.sent: list[tuple] = []
        self.received: list[tuple] = []
        self.connected = 0
        self.logged: list[str] = []

    def address(self, timeout_s: float):
        return "127.0.0.1", 1

    def connect(self, host: str, port: int, spec: object, *timeout_s: float) -> Ended:
        if timeout_s:
            return Ended(("engine 0",))
        self.connected += 1
        return Ended(("training rank 0", "training rank 1"), self.unmet.pop(0) if self.unmet else {})

    def publish(self, version: int, verify: bool) -> Ended:
        self.sent.append((version, verify))
        failed = self.failures.pop(0) if self.failures else {}
        return Ended(("training rank 0", "training rank 1"), failed, {"training rank 0": 60, "training rank 1": 40})

    def receive_weights(self, version: int, verify: bool) -> Ended:
        self.received.append((version, verify))
        return Ended(("engine 0",))

    def restart_dead(self) -> list[str]:
        return [self.dead.pop()] if self.dead else []

    def versions(self) -> list[int]:
        return [self.received[-1][0]]

    def publisher(self, every: int = 0) -> Publisher:
        return Publisher(self, self, None, 10.0, every, self.logged.append)


@pytest.mark.parametrize(("every", "verified"), [(0, [1]), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 4, 7])])
def test_the_first_and_every_nth_transfer_are_verified_at_both_ends(every, verified):
    ends = Ends()
    publisher = ends.publisher(every)
    assert [publisher.publish(version) for version in range(1, 8)] == [100] * 7
    assert publisher.version == 7
    assert ends.sent == ends.received == [(version, version in verified) for version in range(1, 8)]


def test_after_a_restart_the_group_forms_again_and_the_transfer_is_verified():
    ends = Ends({}, {"engine 0": RuntimeError("died")}, dead=["engine 0"])
    publisher = ends.publisher()
    assert [publisher.publish(version) for version in (1, 2, 3)] == [100] * 3
    assert ends.sent == [(1, True), (2, False), (2, True), (3, False)]
    assert ends.connected == 2
    assert ends.logged == ["the weights of version 2 did not arrive: engine 0: died", "started again: engine 0"]


def test_an_engine_that_dies_during_the_repeated_transfer_is_replaced_too():
    ends = Ends(*[{"engine 0": RuntimeError("died")}] * 3, dead=["engine 0"] * 3)
    assert ends.publisher().publish(1) == 100
    assert ends.sent == [(1, True)] * 4 and ends.connected == 4


FROZEN = TimeoutError("did not answer in 20.0 s")


def test_an_engine_that_freezes_while_the_group_forms_again_is_replaced_too():
    ends = Ends(dead=["engine 1", "engine 0"])
    publisher = ends.publisher()
    ends.unmet = [{"engine 1": FROZEN}]
    assert publisher.replace_dead() and not ends.dead
    unmet = "training ranks and engines did not meet: engine 1: did not answer in 20.0 s"
    assert ends.logged == ["started again: engine 0", unmet, "started again: engine 1"]
    assert not publisher.replace_dead()


@pytest.mark.parametrize(
    ("unmet", "dead"),
    [
        ([{"engine 1": FROZEN}], ["engine 0"]),  # it is not found dead
        ([{"training rank 1": FROZEN}], ["engine 1", "engine 0"]),
        ([{"engine 1": FROZEN}] * 3, ["engine 1"] * 4),  # again and again
    ],
)
def test_a_group_that_does_not_form_again_is_an_error(unmet, dead):
    ends = Ends(dead=dead)
    publisher = ends.publisher()
    ends.unmet = unmet
    with pytest.raises(PublishError, match=r"training ranks and engines did not meet: (engine 1|training rank 1): did not answer"):
        publisher.replace_dead()


@pytest.mark.parametrize(
    ("failures", "dead"),
    [
        ([{"training rank 1": RuntimeError("of one's own")}], []),  # no engine is dead
        ([{"engine 0": RuntimeError("died"), "training rank 1": TimeoutError("frozen")}], ["engine 0"]),
        ([{"engine 0": RuntimeError("died")}] * 4, ["engine 0"] * 4),  # again and again
    ],
)
def test_failures_that_a_restart_cannot_cure_are_raised(failures, dead):
    publisher = Ends(*failures, dead=dead).publisher()
    with pytest.raises(PublishError, match=r"the weights of version 1 did not arrive: (engine 0: died|training rank 1: of one's own)"):
        publisher.publish(1)
    assert publisher.version == 0


def test_an_engine_that_reports_another_version_is_an_error():
    ends = Ends()
    publisher = ends.publisher()
    publisher.publish(1)
    ends.versions = lambda: [2, 1]
    with pytest.raises(RuntimeError, match=r"published as version 2, but the engines report \[2, 1\]"):
        publisher.publish(2)
    assert publisher.version == 1


def test_an_error_names_the_first_of_many_failures():
    publisher = Ends({f"training rank {rank}": RuntimeError("gone") for rank in range(9)}).publisher()
    with pytest.raises(PublishError, match=r"training rank 0: gone; .*training rank 3: gone; and 5 more$"):
        publisher.publish(1)
