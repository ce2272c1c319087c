"""New weights from the training ranks to the engines: connect once, publish after every update."""

from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_aspo.rollout.pool import EnginePool
    from megatron_aspo.runtime.trainers import Trainers
    from megatron_aspo.weights.schedule import TransferSpec


_GRACE_S = 3.0
"""Time that the second end of a failed transfer has to say how it failed."""


class Publisher:
    """The driver's part: it starts both ends of a transfer and moves no weights itself."""

    def __init__(self, trainers: "Trainers", engines: "EnginePool", spec: "TransferSpec", timeout_s: float, verify_every: int):
        """Forms the process group of all training ranks and every engine worker. verify_every: as config.transfer_verify_every."""
        self._trainers, self._engines, self._timeout_s = trainers, engines, timeout_s
        self._verify_every = verify_every
        self._published = 0
        self.version = 0
        """What the engines have now; 0 is what they started with."""
        host, port = trainers.address()
        joining = engines.connect(host, port, spec, timeout_s)
        self._buckets = trainers.connect(host, port, spec)
        joining.result(timeout_s)

    def publish(self, version: int) -> int:
        """Bring every engine to the current weights as `version`; returns the bytes sent. Raises when an end fails or times out."""
        verify = self._published % self._verify_every == 0 if self._verify_every else self._published == 0
        self._published += 1
        receiving = self._engines.receive_weights(self._buckets, version, verify)
        pool = ThreadPoolExecutor(2)
        ends = [pool.submit(self._trainers.publish, version, verify), pool.submit(receiving.result, self._timeout_s)]
        done, under_way = wait(ends, return_when=FIRST_EXCEPTION)
        if any(end.exception() for end in done):
            # The other end, left alone, fails too: which of the two says why cannot be told by which was first.
            done |= wait(under_way, _GRACE_S).done
        pool.shutdown(wait=False)
        failures = [end.exception() for end in ends if end in done and end.exception()]
        if len(failures) > 1:
            raise RuntimeError("; ".join(f"{end}: {failure}" for end, failure in zip(("trainer", "engines"), failures, strict=True)))
        if failures:
            raise failures[0]
        sent = ends[0].result()
        versions = self._engines.versions()
        if any(reported != version for reported in versions):
            raise RuntimeError(f"weights were published as version {version}, but the engines report {versions}")
        self.version = version
        return sent
