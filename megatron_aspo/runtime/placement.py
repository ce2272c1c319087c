"""Who has the devices when: training ranks and engines on their own, or by turns on the same."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from megatron_aspo.common.errors import UserError
from megatron_aspo.rollout.engine import EngineError
from megatron_aspo.runtime.publisher import Publisher
from megatron_aspo.weights.holdings import EngineSizes

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

    def restore(self, reason: str) -> None:
        """Replace the engines that were lost while they generated, and bring all to the weights that they had, verified.

        No request may be under way. An engine that was frozen and answers again stays.
        """


class Split:
    """On devices of their own: nobody has to make room."""

    def __init__(self, publisher: Publisher):
        self._publisher = publisher

    def to_training(self) -> None:
        pass

    def to_generating(self, version: int, changed: bool) -> int:
        return self._publisher.publish(version) if changed else 0

    def restore(self, reason: str) -> None:
        _replace_lost(self._publisher, reason)
        # Version 0 is that of the model's directory, which an engine starts with.
        if self._publisher.version:
            self._publisher.publish(self._publisher.version, verify=True)


class Colocated:
    """On the same devices. Never more than one side's caches and states lie there; both sides' weights do while they are sent."""

    def __init__(self, trainers: "Trainers", engines: "EnginePool", publisher: Publisher, sleep_level: int):
        """The engines must be up, and the training ranks have left."""
        self._trainers, self._engines, self._publisher = trainers, engines, publisher
        self._sleep_level = sleep_level
        self._training = False
        self._replaced = False
        """Whether an engine was started again and has not been given weights since."""
        self._restoring = False

    def to_training(self) -> None:
        if self._training:
            return
        # Before the ranks come back: an engine that starts needs the room.
        self._surely(lambda: self._engines.sleep(self._sleep_level))
        self._training = True
        self._trainers.come_back()

    def to_generating(self, version: int, changed: bool) -> int:
        if not self._training:
            return 0
        self._training = False
        self._trainers.leave("optimizer")
        self._surely(lambda: self._engines.wake(("weights",)))
        sent = self._publisher.publish(version, verify=self._replaced) if changed or self._replaced or self._sleep_level == 2 else 0
        self._replaced = False
        self._trainers.leave("weights")
        try:
            self._engines.wake(("kv_cache",))
        except EngineError as error:
            if self._restoring:
                raise
            self.restore(str(error))
        return sent

    def restore(self, reason: str) -> None:
        self._restoring = True
        _replace_lost(self._publisher, reason)
        self._replaced = True
        self.to_training()
        self.to_generating(self._publisher.version, changed=True)
        self._restoring = False

    def _surely(self, halt: Callable[[], None]) -> None:
        """Do this to all engines; if one is dead, or does not answer, once more with another in its place."""
        try:
            halt()
        except EngineError as error:
            _replace_lost(self._publisher, str(error))
            self._replaced = True
            halt()


def _replace_lost(publisher: Publisher, reason: str) -> None:
    publisher.say(reason)
    publisher.replace_dead()


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
