"""New weights from the training ranks to the engines: connect once, publish after every update, start again what dies."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_aspo.common.actors import Pending
    from megatron_aspo.rollout.pool import EnginePool
    from megatron_aspo.runtime.trainers import Trainers
    from megatron_aspo.sync.schedule import TransferSpec


_GRACE_S = 30.0
"""Who is not frozen fails within this time after the first failure, as the ranks that fail leave the group."""
_FAILURES_TOLD = 4
_REPEATS = 3
"""Retries of a transfer after dead engines were replaced."""


class PublishError(RuntimeError):
    """A transfer, or joining for it, failed; says how each of the first that failed did."""

    def __init__(self, what: str, failures: dict[str, Exception]):
        told = [f"{name}: {failure}" for name, failure in list(failures.items())[:_FAILURES_TOLD]]
        more = f"; and {len(failures) - _FAILURES_TOLD} more" if len(failures) > _FAILURES_TOLD else ""
        super().__init__(f"{what}: {'; '.join(told)}{more}")
        self.silent = [name for name, failure in failures.items() if isinstance(failure, TimeoutError)]
        """Who did not even fail."""


class Publisher:
    """The driver's part: it starts both ends of a transfer and moves no weights itself."""

    def __init__(
        self,
        trainers: "Trainers",
        engines: "EnginePool",
        spec: "TransferSpec",
        timeout_s: float,
        verify_every: int,
        say: Callable[[str], None] = print,
    ):
        """Forms the process group of all training ranks and every engine worker.

        timeout_s: how long a rank waits for another; verify_every: as config.transfer_verify_every; say: told what happens to engines.
        """
        self._trainers, self._engines, self._spec, self._timeout_s = trainers, engines, spec, timeout_s
        self._verify_every, self.say = verify_every, say
        self._published = 0
        self.version = 0
        """What the engines have now; 0 is what they started with."""
        self._connect()

    def publish(self, version: int, verify: bool = False) -> int:
        """Bring every engine to the current weights as `version`; returns the bytes sent. verify: now, whatever the recipe says.

        When an engine dies meanwhile, or answers no more, it is started again, with those that its death left half-way, and all are brought
        to `version`, verified. Raises PublishError when no engine is dead, a training rank is, or it fails too often.
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
        """After a transfer that failed: replace what is dead, and send all of it again."""
        for _ in range(_REPEATS):
            self.say(str(failure))
            try:
                if any(name.startswith("training") for name in failure.silent) or not self.replace_dead():
                    break
                return self._transfer(version, verify=True)
            except PublishError as error:
                failure = error
        raise failure

    def replace_dead(self) -> bool:
        """Start again the engines that are dead or answer no more, and let all meet anew; returns whether there were any.

        The new engines hold the weights of the model's directory until the next version is published.
        """
        if not (restarted := self._engines.restart_dead()):
            return False
        self.say(f"started again: {', '.join(restarted)}")
        self._connect()
        return True

    def _connect(self) -> None:
        host, port = self._trainers.address(self._timeout_s)
        joining = self._engines.connect(host, port, self._spec, self._timeout_s)
        self._both("training ranks and engines did not meet", self._trainers.connect(host, port, self._spec), joining)

    def _transfer(self, version: int, verify: bool) -> int:
        receiving = self._engines.receive_weights(version, verify)
        sending = self._trainers.publish(version, verify)
        answers = self._both(f"the weights of version {version} did not arrive", sending, receiving)
        return sum(answers[name] for name in sending.names)

    def _both(self, failed: str, ranks: "Pending", engines: "Pending") -> dict[str, Any]:
        # Each end gives up by itself after the timeout, counted from when it began to wait.
        answers, failures = (ranks + engines).outcomes(2 * self._timeout_s, min(_GRACE_S, self._timeout_s))
        if failures:
            raise PublishError(failed, failures)
        return answers
