"""Who has the devices when: training ranks and engines on their own, or by turns on the same."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from megatron_aspo.errors import UserError
from megatron_aspo.weights.holdings import EngineSizes
from megatron_aspo.weights.publish import Publisher

if TYPE_CHECKING:
    from megatron_aspo.rollout.pool import EnginePool
    from megatron_aspo.runtime.trainers import Trainers


class Placement(Protocol):
    """A run starts with the engines ready to generate."""

    def to_training(self) -> None:
        """Nothing is generated from here on; ranks may train, save and export."""

    def to_generating(self, version: int, changed: bool) -> int:
        """Engines may generate from here on, from the ranks' weights as `version`; returns the bytes sent.

        changed: whether the weights are others than the engines were given last.
        """


class Split:
    """On devices of their own: nobody has to make room."""

    def __init__(self, publisher: Publisher):
        self._publisher = publisher

    def to_training(self) -> None:
        pass

    def to_generating(self, version: int, changed: bool) -> int:
        return self._publisher.publish(version) if changed else 0


class Colocated:
    """On the same devices. Never more than one side's caches and states lie there; both sides' weights do while they are sent."""

    def __init__(self, trainers: "Trainers", engines: "EnginePool", publisher: Publisher, sleep_level: int):
        """The engines must be up, and the training ranks have left."""
        self._trainers, self._engines, self._publisher = trainers, engines, publisher
        self._sleep_level = sleep_level
        self._training = False

    def to_training(self) -> None:
        if self._training:
            return
        self._training = True
        self._engines.sleep(self._sleep_level)
        self._trainers.come_back()

    def to_generating(self, version: int, changed: bool) -> int:
        if not self._training:
            return 0
        self._training = False
        self._trainers.leave("optimizer")
        self._engines.wake(("weights",))
        sent = self._publisher.publish(version) if changed or self._sleep_level == 2 else 0
        self._trainers.leave("weights")
        self._engines.wake(("kv_cache",))
        return sent


def check_places(placement: str, ranks: int, engines: EngineSizes) -> None:
    """Raises UserError when engines are to share devices that there are not."""
    if placement == "colocated" and engines.world > ranks:
        raise UserError(
            f"placement=colocated: {engines.engines} engines of {engines.tensor} devices need {engines.world} training ranks to share them "
            f"with, there are {ranks}; lower rollout.engines or rollout.tensor_parallel, or set placement=split"
        )


def shared_places(ranks: Sequence[tuple[str, str]], engines: EngineSizes) -> list[tuple[str, str]]:
    """Of each engine the node and its devices on it, with commas: those of as many ranks, in their order.

    ranks: of each its node and device. Raises UserError when an engine's would lie on two nodes.
    """
    found = []
    for engine in range(engines.engines):
        first = engine * engines.tensor
        mine = ranks[first : first + engines.tensor]
        if len({node for node, _ in mine}) > 1:
            raise UserError(
                f"placement=colocated: engine {engine} would share the devices of training ranks {first} to {first + len(mine) - 1}, which "
                "live on several nodes; an engine lives on one: lower rollout.tensor_parallel, or set placement=split"
            )
        found.append((mine[0][0], ",".join(device for _, device in mine if device)))
    return found
