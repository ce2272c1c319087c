"""A long-lived pool of real processes for each world size: starting one costs seconds of imports, so the tests of a session share them."""

import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def _serve(pipe: Connection) -> None:
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    import torch

    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        # Process groups live as long as the models that hold them, each with its threads: hundreds of idle ones slow every test.
        gc.collect()


class Pool:
    """`world` processes. Each job meets in a process group of its own and leaves it at the end."""

    def __init__(self, world: int):
        context = multiprocessing.get_context("spawn")
        self._meetings = tempfile.TemporaryDirectory()
        self._jobs = 0
        self._pipes, self._processes = [], []
        for _ in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable, *arguments: Any, timeout_s: float = 180) -> list[Any]:
        """`function(rank, meeting, *arguments)` on every rank; the results by rank. Any rank's failure fails the caller."""
        self._jobs += 1
        meeting = f"{self._meetings.name}/{self._jobs}"
        for rank, pipe in enumerate(self._pipes):
            pipe.send((function, (rank, meeting, *arguments)))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout_s):
                raise TimeoutError(f"rank {rank} gave no answer in {timeout_s} s")
            done, value = pipe.recv()
            results.append(value)
            if not done:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            raise RuntimeError("\n".join(failures))
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._meetings.cleanup()
