"""The threads of a grading server, each with its own reward process and, created lazily, its own sandboxes.

Threads live as long as the server: the kernel ends a reward's process, and a sandbox, when the thread that started it ends.
"""

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards.options import RewardOptions
from megatron_aspo.rewards.process import RewardProcess
from megatron_aspo.rewards.result import RewardResult
from megatron_aspo.rewards.sandbox.pool import SandboxPool
from megatron_aspo.rewards.service.run_code import run_code

MAX_WAITING = 4096
"""Maximum number of requests that wait for a thread."""


class Busy(Exception):
    """Too many requests wait."""


class _Worker:
    """The resources of one thread: a reward's process and sandboxes."""

    def __init__(self, task: str, options: RewardOptions):
        self._task, self._options = task, options
        self._process: RewardProcess | None = None
        self._sandboxes: SandboxPool | None = None

    def start(self) -> RewardProcess:
        """Load the reward in a new process and return it. Raises UserError."""
        process = self._process = RewardProcess(self._task, self._options, os.getcwd())
        process.start()
        return process

    def score(self, prompt: Prompt, response: str) -> RewardResult:
        """Score a response. Raises UserError as a reward does; the next response then gets a new process."""
        process = self._process or self.start()
        try:
            (result,) = process.score([(prompt, response)])
            return result
        except UserError:
            process.close()
            self._process = None
            raise

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request of SandboxFusion's `/run_code`. Raises UserError for an invalid request or a machine without a sandbox."""
        if self._sandboxes is None:
            self._sandboxes = SandboxPool(self._options.code.sandbox, self._options.code.limits)
        return run_code(request, self._sandboxes, self._options.code.limits)

    def kill(self) -> None:
        """End the reward's process from another thread; a response that is being graded ends with an error."""
        if process := self._process:
            process.close()

    def close(self) -> None:
        """End the reward's process and the sandboxes; to be called by the worker's own thread."""
        for part in (self._process, self._sandboxes):
            if part:
                part.close()


class Workers:
    """`count` grading threads. A context manager: entering waits until each has loaded the reward."""

    def __init__(self, task: str, options: RewardOptions, count: int):
        self._jobs: queue.Queue[tuple[Future, Callable[[_Worker], Any]] | None] = queue.Queue()
        self._workers = [_Worker(task, options) for _ in range(count)]
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self.unfinished = 0
        """Number of requests that wait or are being graded."""

    def score(self, prompt: Prompt, response: str) -> RewardResult:
        """Score a response on the next free thread. Raises UserError as the reward does, and Busy."""
        return self._submit(lambda worker: worker.score(prompt, response))

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run a program on the next free thread. Raises UserError and Busy."""
        return self._submit(lambda worker: worker.run(request))

    def _submit(self, job: Callable[[_Worker], Any]) -> Any:
        with self._lock:
            if self.unfinished >= MAX_WAITING:
                raise Busy
            self.unfinished += 1
        future: Future = Future()
        try:
            self._jobs.put((future, job))
            return future.result()
        finally:
            with self._lock:
                self.unfinished -= 1

    def _serve(self, worker: _Worker, loaded: Future) -> None:
        try:
            worker.start()
            loaded.set_result(None)
            while (item := self._jobs.get()) is not None:
                future, job = item
                try:
                    future.set_result(job(worker))
                except BaseException as error:
                    future.set_exception(error)
        except BaseException as error:
            loaded.set_exception(error)
        finally:
            worker.close()

    def __enter__(self) -> "Workers":
        """Start the threads. Raises UserError if the reward cannot be loaded."""
        loaded = [Future() for _ in self._workers]
        self._threads = [threading.Thread(target=self._serve, args=pair, daemon=True) for pair in zip(self._workers, loaded, strict=True)]
        try:
            for thread in self._threads:
                thread.start()
            for future in loaded:
                future.result()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        """End the threads and their processes, without waiting for responses that are being graded."""
        for _ in self._threads:
            self._jobs.put(None)
        for worker in self._workers:
            worker.kill()
        for thread in self._threads:
            thread.join(10.0)
