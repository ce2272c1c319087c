"""New weights from the training ranks to the engines: connect once, publish after every update."""

from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_aspo.rollout.pool import EnginePool
    from megatron_aspo.runtime.trainers import Trainers


class Publisher:
    """The driver's part: it starts both ends of a transfer and moves no weights itself."""

    def __init__(self, trainers: "Trainers", engines: "EnginePool", engine_workers: int, dtype: str, bucket_bytes: int, timeout_s: float):
        """Forms the process group of rank 0 and every engine worker. `engine_workers`: engines × their tensor-parallel size."""
        self._trainers, self._engines = trainers, engines
        self._dtype, self._bucket_bytes, self._timeout_s = dtype, bucket_bytes, timeout_s
        self._metas = trainers.tensor_metas(dtype)
        self.version = 0
        """What the engines have now; 0 is what they started with."""
        host, port = trainers.address()
        joining = engines.connect(host, port, 1 + engine_workers, timeout_s)
        trainers.connect(host, port, 1 + engine_workers)
        joining.result(timeout_s)

    def publish(self, version: int) -> int:
        """Bring every engine to the current weights as `version`; returns the bytes sent. Raises when an end fails or times out."""
        receiving = self._engines.receive_weights(self._metas, self._bucket_bytes, version)
        pool = ThreadPoolExecutor(2)
        ends = [pool.submit(self._trainers.publish, self._dtype, self._bucket_bytes), pool.submit(receiving.result, self._timeout_s)]
        # Whichever end fails says why; the other would only report, a timeout later, that its peer is gone.
        done, _ = wait(ends, return_when=FIRST_EXCEPTION)
        pool.shutdown(wait=False)
        for end in done:
            end.result()
        sent = ends[0].result()
        versions = self._engines.versions()
        if any(reported != version for reported in versions):
            raise RuntimeError(f"weights were published as version {version}, but the engines report {versions}")
        self.version = version
        return sent
