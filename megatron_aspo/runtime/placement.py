"""Device placement: training ranks and engines on separate devices, or time-sharing the same."""

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
    """Switches between training and generating. A run starts with the engines ready to generate."""

    def to_training(self) -> None:
        """Stop generation; afterwards ranks may train, save and export."""

    def to_generating(self, version: int, changed: bool) -> int:
        """Make the engines ready to generate from the ranks' weights as `version`; return the bytes sent.

        changed: whether the weights differ from those sent last.
        """

    def restore(self, reason: str) -> None:
        """Replace the engines that were lost during generation, and send all engines their current version of the weights, verified.

        No request may be in flight. An engine that was frozen and answers again is kept.
        """


class Split:
    """Separate devices: neither side has to free memory for the other."""

    def __init__(self, publisher: Publisher):
        self._publisher = publisher

    def to_training(self) -> None:
        pass

    def to_generating(self, version: int, changed: bool) -> int:
        return self._publisher.publish(version) if changed else 0

    def restore(self, reason: str) -> None:
        _replace_lost(self._publisher, reason)
        # An engine starts with version 0, the model directory's weights.
        if self._publisher.version:
            self._publisher.publish(self._publisher.version, verify=True)


class Colocated:
    """Shared devices. They never hold the caches and states of both sides at once; during a sync they hold both sides' weights."""

    def __init__(self, trainers: "Trainers", engines: "EnginePool", publisher: Publisher, sleep_level: int):
        """Take over the sides. The engines must be up, and the training ranks offloaded."""
        self._trainers, self._engines, self._publisher = trainers, engines, publisher
        self._sleep_level = sleep_level
        self._training = False
        self._replaced = False
        """Whether an engine was restarted and has not received weights since."""
        self._restoring = False

    def to_training(self) -> None:
        if self._training:
            return
        # Before the ranks reload: an engine that starts needs the memory.
        self._with_replacement(lambda: self._engines.sleep(self._sleep_level))
        self._training = True
        self._trainers.reload()

    def to_generating(self, version: int, changed: bool) -> int:
        if not self._training:
            return 0
        self._training = False
        self._trainers.offload("optimizer")
        self._with_replacement(lambda: self._engines.wake(("weights",)))
        sent = self._publisher.publish(version, verify=self._replaced) if changed or self._replaced or self._sleep_level == 2 else 0
        self._replaced = False
        self._trainers.offload("weights")
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

    def _with_replacement(self, action: Callable[[], None]) -> None:
        """Run an action on all engines; if one is dead or does not answer, replace it and run the action once more."""
        try:
            action()
        except EngineError as error:
            _replace_lost(self._publisher, str(error))
            self._replaced = True
            action()


def _replace_lost(publisher: Publisher, reason: str) -> None:
    publisher.say(reason)
    publisher.replace_dead()


def check_places(placement: str, ranks: int, engines: EngineSizes) -> None:
    """Raise UserError if engines are to share more devices than the training ranks have."""
    if placement == "colocated" and engines.world > ranks:
        raise UserError(
            f"placement=colocated: {engines.engines} engines of {engines.tensor} devices need {engines.world} training ranks to share them "
            f"with, there are {ranks}; lower rollout.engines or rollout.tensor_parallel, or set placement=split"
        )


def shared_places(ranks: Sequence[tuple[str, str]], engines: EngineSizes) -> list[tuple[str, str]]:
    """Return each engine's node and its devices there, joined by commas: those of consecutive ranks.

    ranks: node and device of each rank. Raises UserError if an engine's devices would be on two nodes.
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
