"""Which side uses the devices when: training ranks and engines have their own, or time-share the same."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from megatron_aspo.common.errors import UserError
from megatron_aspo.rollout.engine import EngineError
from megatron_aspo.rollout.engine_layout import EngineSizes
from megatron_aspo.runtime.publisher import Publisher

if TYPE_CHECKING:
    from megatron_aspo.rollout.pool import EnginePool
    from megatron_aspo.runtime.trainers import Trainers

_REPLACEMENTS = 3
"""Times that lost engines are replaced, one after another, before a change of sides fails."""


class Placement(Protocol):
    """Switches between training and generating. A run starts with the engines ready to generate."""

    def to_training(self) -> None:
        """Stop generating; afterwards ranks may train, save and export."""
        ...

    def to_generating(self, version: int, changed: bool) -> int:
        """Let engines generate with the ranks' weights as `version`; return the bytes sent.

        changed: whether the weights differ from those that the engines were sent last.
        """
        ...

    def restore(self, reason: str) -> None:
        """Replace the engines that were lost while they generated, and bring all to the weights that they had, verified.

        No request may be running. An engine that was frozen and answers again is kept.
        """
        ...


class Split:
    """Engines and training ranks have separate devices: no side has to free memory."""

    def __init__(self, publisher: Publisher):
        self._publisher = publisher

    def to_training(self) -> None:
        pass

    def to_generating(self, version: int, changed: bool) -> int:
        return self._publisher.publish(version) if changed else 0

    def restore(self, reason: str) -> None:
        _replace_dead(self._publisher, reason)
        # Version 0 is that of the model's directory, with which an engine starts.
        if self._publisher.version:
            self._publisher.publish(self._publisher.version, verify=True)


class Colocated:
    """Engines and training ranks share devices. At most one side's caches and states are on them; both sides' weights during a transfer."""

    def __init__(self, trainers: "Trainers", engines: "EnginePool", publisher: Publisher, sleep_level: int):
        """The engines must have started, and the training ranks must have offloaded their memory."""
        self._trainers, self._engines, self._publisher = trainers, engines, publisher
        self._sleep_level = sleep_level
        self._training = False
        self._replaced = False
        """Whether an engine was restarted and has not been sent weights since."""
        self._restorations = 0
        """Calls of `restore` in progress: it is called within itself when another engine is lost meanwhile."""

    def to_training(self) -> None:
        if self._training:
            return
        # Before the ranks reload: an engine that starts needs the memory.
        self._retry_with_replacement(lambda: self._engines.sleep(self._sleep_level))
        self._training = True
        self._trainers.reload()

    def to_generating(self, version: int, changed: bool) -> int:
        if not self._training:
            return 0
        self._training = False
        self._trainers.offload("optimizer")
        self._retry_with_replacement(lambda: self._engines.wake(("weights",)))
        sent = self._publisher.publish(version, verify=self._replaced) if changed or self._replaced or self._sleep_level == 2 else 0
        self._replaced = False
        self._trainers.offload("weights")
        try:
            self._engines.wake(("kv_cache",))
        except EngineError as error:
            if self._restorations == _REPLACEMENTS:
                raise
            self.restore(str(error))
        return sent

    def restore(self, reason: str) -> None:
        self._restorations += 1
        _replace_dead(self._publisher, reason)
        self._replaced = True
        self.to_training()
        self.to_generating(self._publisher.version, changed=True)
        self._restorations = 0

    def _retry_with_replacement(self, call: Callable[[], None]) -> None:
        """Call this on all engines; while one is dead or silent, replace it and call again, `_REPLACEMENTS` times."""
        for _ in range(_REPLACEMENTS):
            try:
                return call()
            except EngineError as error:
                _replace_dead(self._publisher, str(error))
                self._replaced = True
        call()


def _replace_dead(publisher: Publisher, reason: str) -> None:
    publisher.log(reason)
    publisher.replace_dead()


def check_placement(placement: str, ranks: int, engines: EngineSizes) -> None:
    """Raise UserError when engines would share devices that do not exist."""
    if placement == "colocated" and engines.world > ranks:
        raise UserError(
            f"placement=colocated: {engines.engines} engines of {engines.tensor} devices need {engines.world} training ranks to share them "
            f"with, there are {ranks}; lower rollout.engines or rollout.tensor_parallel, or set placement=split"
        )


def shared_locations(ranks: Sequence[tuple[str, str]], engines: EngineSizes) -> list[tuple[str, str]]:
    """Return the node and the devices, separated by commas, of each engine: those of as many consecutive ranks.

    ranks: node and device of each training rank. Raises UserError when the devices of an engine would be on several nodes.
    """
    found = []
    for engine in range(engines.engines):
        first = engine * engines.tensor
        own = ranks[first : first + engines.tensor]
        if len({node for node, _ in own}) > 1:
            raise UserError(
                f"placement=colocated: engine {engine} would share the devices of training ranks {first} to {first + len(own) - 1}, which "
                "live on several nodes; an engine lives on one: lower rollout.tensor_parallel, or set placement=split"
            )
        found.append((own[0][0], ",".join(device for _, device in own if device)))
    return found
