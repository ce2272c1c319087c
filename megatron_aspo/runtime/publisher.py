"""Publishing new weights from the training ranks to the engines: connect once, publish after every update, restart what dies."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_aspo.common.errors import ProcessError

if TYPE_CHECKING:
    from megatron_aspo.common.actors import Pending
    from megatron_aspo.rollout.pool import EnginePool
    from megatron_aspo.rollout.transfer_spec import TransferSpec
    from megatron_aspo.runtime.trainers import Trainers


_GRACE_S = 30.0
"""After a first failure every live peer fails within this time, because failing ranks leave the group. A silent peer is frozen."""
_MAX_NAMED = 4
_REPEATS = 3
"""Retries of a transfer after dead engines were replaced."""


class PublishError(ProcessError):
    """A transfer, or connecting for it, failed; names the first processes that failed, with their errors."""

    def __init__(self, what: str, failures: dict[str, Exception]):
        reasons = [f"{name}: {failure}" for name, failure in list(failures.items())[:_MAX_NAMED]]
        more = f"; and {len(failures) - _MAX_NAMED} more" if len(failures) > _MAX_NAMED else ""
        super().__init__(f"{what}: {'; '.join(reasons)}{more}")
        self.silent = [name for name, failure in failures.items() if isinstance(failure, TimeoutError)]
        """The processes that neither answered nor failed."""


class Publisher:
    """The driver's part of weight transfers: it starts both ends and moves no weights itself."""

    def __init__(
        self,
        trainers: "Trainers",
        engines: "EnginePool",
        spec: "TransferSpec",
        timeout_s: float,
        verify_every: int,
        log: Callable[[str], None] = print,
    ):
        """Form the process group of all training ranks and engine workers. Raises PublishError.

        timeout_s: how long a rank waits for another; verify_every: as config.transfer_verify_every; log: prints what happens to engines.
        """
        self._trainers, self._engines, self._spec, self._timeout_s = trainers, engines, spec, timeout_s
        self._verify_every, self.log = verify_every, log
        self._published = 0
        self.version = 0
        """The version that the engines hold; 0: the weights with which they started."""
        self._connect()

    def publish(self, version: int, verify: bool = False) -> int:
        """Bring every engine to the current weights as `version`; return the bytes sent. verify: this time, whatever the recipe says.

        When an engine dies or stops answering, it is restarted together with the engines whose update it interrupted, and all are brought
        to `version`, verified. Raises PublishError when no engine is dead, when a training rank is, or when it fails too often.
        """
        verify |= self._published % self._verify_every == 0 if self._verify_every else self._published == 0
        self._published += 1
        try:
            sent = self._transfer(version, verify)
        except PublishError as error:
            sent = self._repeat(version, error)
        versions = self._engines.versions()
        if any(reported != version for reported in versions):
            raise RuntimeError(f"weights were published as version {version}, but the engines report {versions}")
        self.version = version
        return sent

    def _repeat(self, version: int, failure: PublishError) -> int:
        """Replace dead engines after a failed transfer and send all weights to all engines again; return the bytes sent.

        Raises the last failure: after `_REPEATS` attempts, when a training rank is silent, or when no engine was dead.
        """
        for _ in range(_REPEATS):
            self.log(str(failure))
            try:
                if any(name.startswith("training") for name in failure.silent) or not self.replace_dead():
                    break
                return self._transfer(version, verify=True)
            except PublishError as error:
                failure = error
        raise failure

    def replace_dead(self) -> bool:
        """Restart the engines that are dead or silent, and form the group again; return whether there were any.

        The new engines hold the weights of the model's directory until the next version is published. An engine that dies or freezes while
        the group forms is restarted too. Raises PublishError: after `_REPEATS` attempts, when a training rank is silent, or when the group
        does not form though no engine is dead.
        """
        failure: PublishError | None = None
        for _ in range(_REPEATS):
            if not (restarted := self._engines.restart_dead()):
                break
            self.log(f"started again: {', '.join(restarted)}")
            try:
                self._connect()
                return True
            except PublishError as error:
                failure = error
                if any(name.startswith("training") for name in failure.silent):
                    break
                self.log(str(failure))
        if failure is not None:
            raise failure
        return False

    def _connect(self) -> None:
        host, port = self._trainers.address(self._timeout_s)
        joining = self._engines.connect(host, port, self._spec, self._timeout_s)
        self._wait_for_both("training ranks and engines did not meet", self._trainers.connect(host, port, self._spec), joining)

    def _transfer(self, version: int, verify: bool) -> int:
        receiving = self._engines.receive_weights(version, verify)
        sending = self._trainers.publish(version, verify)
        answers = self._wait_for_both(f"the weights of version {version} did not arrive", sending, receiving)
        return sum(answers[name] for name in sending.names)

    def _wait_for_both(self, failed: str, ranks: "Pending", engines: "Pending") -> dict[str, Any]:
        # Each end times out by itself, counted from when it began to wait.
        answers, failures = (ranks + engines).outcomes(2 * self._timeout_s, min(_GRACE_S, self._timeout_s))
        if failures:
            raise PublishError(failed, failures)
        return answers
