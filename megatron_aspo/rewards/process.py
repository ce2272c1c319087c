"""A reward in a child process, with a time limit for each response. A child that hangs or dies is killed and replaced.

The limit is enforced from outside: a reward may block in C code, hold the interpreter's lock or ignore every signal but SIGKILL. The child
answers one response at a time over a socket, so the parent knows which response it was scoring. The child's side is in `child.py`.
"""

import contextlib
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards.child import OUT_OF_MEMORY
from megatron_aspo.rewards.options import RewardOptions
from megatron_aspo.rewards.result import RewardResult

LOAD_TIMEOUT_S = 300.0
"""Seconds to import the reward's module: enough for torch and a dictionary on a cold network disk."""
_TICK_S = 0.1
"""Seconds between checks of the time limit; a child is killed at most this much late."""
_MAX_ANSWER_BYTES = 16 << 20
"""Longest answer that is read. Every rollout dump stores it, and without a limit it could exhaust this process's memory."""
_BOOTSTRAP = "import sys; sys.path[:] = sys.argv[2:]; from megatron_aspo.rewards.child import serve; serve(int(sys.argv[1]))"
"""Gives the child its parent's module path. PYTHONPATH would be inherited by programs that a reward starts."""


def reward_name(task: str, options: RewardOptions) -> str:
    """Return the name of the reward in errors."""
    if options.rewards:
        return "data.rewards"
    return f"data.reward={options.reward}" if options.reward else f"the reward of task={task}"


def check_reward(task: str, options: RewardOptions) -> None:
    """Load the task's reward in a child process, then end the process. Raises UserError as `RewardProcess.start` does."""
    process = RewardProcess(task, options, os.getcwd())
    try:
        process.start()
    finally:
        process.close()


def longest_score_s(options: RewardOptions) -> float:
    """Return an upper bound of the seconds in which `RewardProcess.score` scores one response.

    It tries at most two child processes: each loads the reward, and has the time limit for reading the response and for answering.
    """
    return 2 * (LOAD_TIMEOUT_S + 2 * options.reward_timeout_s)


class RewardProcess:
    """One child process that scores responses. Call `start` first and `close` last."""

    def __init__(self, task: str, options: RewardOptions, directory: str):
        """directory: the child's working directory, if it exists on this machine; modules in it can be imported."""
        self._task, self._options, self._directory = task, options, directory
        self._name = reward_name(task, options)
        self._watchdog = _Watchdog(self._kill)
        self._child: subprocess.Popen | None = None
        self._lock = threading.Lock()
        self._closed = False

    def start(self) -> None:
        """Start the child and load the reward. Raises UserError if loading fails, ends the child or takes over `LOAD_TIMEOUT_S`."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            if self._closed:
                raise UserError(f"{self._name} was stopped")
            # Buffered: one read gets many answers, which matters for scores that take microseconds.
            self._connection, self._answers = ours, ours.makefile("rb")
            self._child = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, str(theirs.fileno()), *sys.path],
                cwd=self._directory if os.path.isdir(self._directory) else None,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            self._send((self._task, self._options), LOAD_TIMEOUT_S)
            self._receive(LOAD_TIMEOUT_S)
        except _ChildEnded as end:
            raise UserError(f"{self._name} cannot be loaded: importing it {end.reason}; correct its module") from end

    def score(self, batch: Sequence[tuple[Prompt, str]]) -> Iterator[RewardResult]:
        """Yield the result of each (prompt, response), in order.

        A response that takes more than `data.reward_timeout_s` seconds, or that crashes the child twice, gets `data.reward_failure_score`.
        Raises UserError if the reward raises an exception or returns no score, unless `data.reward_on_error` is `score`.
        """
        done, crashed = 0, False
        while done < len(batch):
            try:
                for result in self._score_in_one_child(batch[done:]):
                    yield result
                    done, crashed = done + 1, False
            except _ChildEnded as end:
                if end.failure == "crash" and not crashed:
                    crashed = True  # retried once, as the cause may be the machine: the kernel kills processes when memory runs out
                    continue
                reason = end.reason if end.failure == "timeout" else f"{end.reason} twice"
                yield RewardResult(self._options.reward_failure_score, reason, {"failed": True}, end.failure)
                done, crashed = done + 1, False
            except GeneratorExit:
                self._kill()  # its remaining answers would be taken for those of the next batch
                raise

    def close(self) -> None:
        """Kill the child and everything it started. Idempotent; may be called from another thread while `score` waits."""
        with self._lock:
            self._closed = True
        self._watchdog.stop()
        self._kill()

    def _score_in_one_child(self, batch: Sequence[tuple[Prompt, str]]) -> Iterator[RewardResult]:
        """Yield the results. Raises _ChildEnded at the response at which the child hung or died."""
        limit_s = self._options.reward_timeout_s
        if self._child is None or self._child.returncode is not None:
            self.start()
        self._send(batch, limit_s)
        for _ in batch:
            yield RewardResult(*self._receive(limit_s))

    def _send(self, message: Any, limit_s: float) -> None:
        data = pickle.dumps(message)
        # Limited too: a thread that a reward left behind can keep the child from reading.
        self._call_with_limit(limit_s, lambda: self._connection.sendall(data) or True)

    def _receive(self, limit_s: float) -> Any:
        """Return the child's next answer. Raises UserError with the child's message if it is an error."""
        line = self._call_with_limit(limit_s, lambda: self._answers.readline(_MAX_ANSWER_BYTES))
        if not line.endswith(b"\n"):  # too long, or torn by the child's death
            raise _ChildEnded(None, self._kill(), too_long=len(line) == _MAX_ANSWER_BYTES)
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise UserError(answer["error"])
        return answer

    def _call_with_limit(self, limit_s: float, call: Callable[[], Any]) -> Any:
        """Return the result of `call`, a blocking use of the connection; no result or an OSError means that the child closed it.

        Raises _ChildEnded if it did, or if the child was killed because `call` took more than `limit_s`.
        """
        self._watchdog.start(limit_s)
        try:
            result = call()
        except OSError:
            result = None
        expired = self._watchdog.cancel()
        if expired or not result:
            status = self._kill()
            raise _ChildEnded(limit_s if expired and status == -signal.SIGKILL else None, status)
        return result

    def _kill(self) -> int | None:
        """Kill the child, its descendants and its process group; return the child's exit status in subprocess's convention."""
        with self._lock:
            child = self._child
            if child is None:
                return None
            if child.returncode is None:  # else its pid may have been reused
                family = []
                with contextlib.suppress(psutil.Error):
                    family = psutil.Process(child.pid).children(recursive=True)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                for process in family:  # includes those in other sessions
                    with contextlib.suppress(psutil.Error):  # it has ended, or belongs to another user (sudo)
                        process.kill()
            return child.wait()


class _ChildEnded(Exception):
    """The child hung and was killed, or it died."""

    def __init__(self, limit_s: float | None, status: int | None, too_long: bool = False):
        """limit_s: the limit it exceeded, None if it died by itself; status: its exit status; too_long: whether its answer was."""
        self.failure = "crash" if limit_s is None else "timeout"
        if limit_s is not None:
            self.reason = f"timed out after {limit_s:g} s"
        elif status == OUT_OF_MEMORY:
            self.reason = "got no more memory"
        elif too_long:
            self.reason = f"returned details of over {_MAX_ANSWER_BYTES >> 20} MiB"
        elif status is not None and status < 0:
            self.reason = f"crashed its process ({signal.strsignal(-status)})"
        else:
            self.reason = f"ended its process (exit status {status})"


class _Watchdog:
    """Calls a function when an operation exceeds its time limit: call `start`, run the operation, call `cancel`."""

    def __init__(self, act: Callable[[], Any]):
        self._act = act
        self._deadline = math.inf
        self._expired = False
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def start(self, limit_s: float) -> None:
        with self._lock:
            self._deadline = time.monotonic() + limit_s

    def cancel(self) -> bool:
        """Stop timing; return whether the limit was exceeded."""
        with self._lock:
            expired, self._deadline, self._expired = self._expired, math.inf, False
        return expired

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(_TICK_S):
            with self._lock:
                if time.monotonic() > self._deadline:
                    self._deadline, self._expired = math.inf, True
                    self._act()
