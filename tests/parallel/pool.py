"""A long-lived pool of real processes for each world size, shared by the tests of a session.

The processes are forked from a process that has imported the slow modules (multiprocessing's fork server), not spawned.
"""

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_aspo.runtime.guard import environment_set

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
IMPORTED_ONCE = ["megatron_aspo.trainer.rank", "megatron_aspo.checkpoint.saver"]
"""Modules that the fork server imports. With one OpenMP thread it starts none, so forking is safe; none of these starts CUDA."""
GRACE_S = 20.0
"""Seconds for the ranks that are left when one has failed."""


def _serve(pipe: Connection) -> None:
    os.environ.update(ENVIRONMENT)
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
    """`world` processes. Each job creates its own process group and leaves it at the end."""

    def __init__(self, world: int):
        self._world = world
        self._meetings = tempfile.TemporaryDirectory()
        self._jobs = 0
        self._start()

    def run(self, function: Callable, *arguments: Any, timeout_s: float = 180) -> list[Any]:
        """Run `function(rank, meeting, *arguments)` on every rank; return the results by rank. Any rank's failure fails the caller."""
        self._jobs += 1
        meeting = f"{self._meetings.name}/{self._jobs}"
        for rank, pipe in enumerate(self._pipes):
            pipe.send((function, (rank, meeting, *arguments)))
        answers: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + timeout_s
        while len(answers) < self._world and (ready := wait(self._unanswered(answers), max(0.0, end - time.monotonic()))):
            for pipe in ready:
                answers[rank := self._pipes.index(pipe)] = self._answer(pipe)
                if not answers[rank][0]:  # the others may wait for it forever
                    end = min(end, time.monotonic() + GRACE_S)
        failures = [f"rank {rank}:\n{value}" for rank, (done, value) in sorted(answers.items()) if not done]
        if len(answers) < self._world:
            silent = sorted(set(range(self._world)) - answers.keys())
            failures.append(f"ranks {silent} gave no answer in {timeout_s} s, or {GRACE_S} s after a failure")
        if failures:  # new processes: none continues a job that is over
            self._stop()
            self._start()
            raise RuntimeError("\n".join(failures))
        return [answers[rank][1] for rank in range(self._world)]

    def close(self) -> None:
        self._stop()
        self._meetings.cleanup()

    def _unanswered(self, answers: dict[int, Any]) -> list[Connection]:
        return [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]

    @staticmethod
    def _answer(pipe: Connection) -> tuple[bool, Any]:
        try:
            return pipe.recv()
        except EOFError:
            return False, "its process is dead"

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED_ONCE)
        self._pipes, self._processes = [], []
        with environment_set(ENVIRONMENT):  # the fork server inherits it when the first process is started
            for _ in range(self._world):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
