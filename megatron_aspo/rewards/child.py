"""The child process in which a reward runs: it loads the reward, then answers each response with one line of JSON.

The parent's side is in `process.py`. Answers are JSON, not pickle, because a model's text may control what runs here.
"""

import ctypes
import json
import os
import pickle
import resource
import signal
import socket
import sys
from typing import BinaryIO

from megatron_aspo.common.errors import UserError
from megatron_aspo.rewards.result import RewardResult

OUT_OF_MEMORY = 82
"""Exit status of a reward's process that runs out of memory."""
_PR_SET_PDEATHSIG = 1


def serve(descriptor: int) -> None:
    """Serve requests on the socket `descriptor` until the parent closes it. An answer is `[score, reason, details, failure]` or
    `{"error": text}`.

    The first request is (task, options), answered by `{}` once the reward is loaded; each further one is a list of (prompt, response).
    """
    os.set_inheritable(descriptor, False)
    # The parent may be killed while a reward is stuck here: the kernel then kills this process. For the kernel the parent is the thread
    # that started this process; in a Ray actor that is the one thread that runs its methods.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    del sys.argv[1:]
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rb") as requests:
        try:
            _answer_all(requests, connection)
        except EOFError:  # the parent closed the connection, or died
            return


def _answer_all(requests: BinaryIO, connection: socket.socket) -> None:
    from megatron_aspo.data.store import with_answer
    from megatron_aspo.rewards.user import RewardError
    from megatron_aspo.tasks.task import build_reward  # data.tasks imports rewards

    task, options = pickle.load(requests)
    if options.reward_memory_gib:
        limit = int(options.reward_memory_gib * (1 << 30))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        reward = build_reward(task, options)
    except UserError as error:
        _send(connection, {"error": str(error)})
        return
    _send(connection, {})
    while True:
        for prompt, response in pickle.load(requests):
            try:
                result = reward(with_answer(prompt), response)
            except UserError as error:
                if not isinstance(error, RewardError) or options.reward_on_error == "stop":
                    _send(connection, {"error": str(error)})
                    return
                result = RewardResult(options.reward_failure_score, error.fault, {"failed": True}, "error")
            except MemoryError:
                os._exit(OUT_OF_MEMORY)
            _send(connection, [result.score, result.reason, result.details, result.failure])


def _send(connection: socket.socket, answer: list | dict) -> None:
    connection.sendall(json.dumps(answer, allow_nan=False).encode() + b"\n")
