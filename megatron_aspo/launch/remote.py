"""Calls of the agent on hosts: over ssh, or directly on this machine."""

import json
import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_aspo.common.errors import UserError
from megatron_aspo.launch.agent import ANSWER
from megatron_aspo.launch.hosts import Host

_AGENT = Path(__file__).with_name("agent.py")
_BOOT = "import sys;i=sys.stdin.buffer;exec(compile(i.read(int(i.readline())),'agent.py','exec'))"
_SSH = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
"""ssh asks no questions, and notices a vanished host after 15 s. These options come last, because ssh keeps the first value it is given."""
_LINES = 20
_NOISE = (
    "** WARNING: connection is not using a post-quantum",
    "** This session may be vulnerable",
    "** The server may need to be upgraded",
)


class HostError(Exception):
    """A host could not fulfil a request; carries its name and its last lines of output."""

    def __init__(self, host: str, reason: str):
        super().__init__(f"{host}: {reason}")
        self.host = host


@dataclass(frozen=True)
class Reach:
    """Access to the hosts, with their Python and directory; the same for start and stop."""

    directory: str
    """Directory for state on each host; `~` is its home directory."""
    python: str
    activate: str = ""
    """Shell command to run before Python."""
    ssh_options: tuple[str, ...] = ()

    def call(
        self, verb: str, host: Host, request: Mapping[str, Any], limit_s: float | None, running: set[subprocess.Popen] | None = None
    ) -> dict[str, Any]:
        """Have the host's agent execute `verb`, and return its answer. Raises HostError if it refuses, fails, is unreachable or too slow.

        limit_s: None is no limit. running: the set that holds the call's process while it runs.
        """
        over_ssh = not is_this_machine(host.name)
        whole = {"verb": verb, "host": host.name, "directory": self.directory, "over_ssh": over_ssh, **request}
        agent = _AGENT.read_bytes()
        sent = b"%d\n" % len(agent) + agent + json.dumps(whole).encode()
        command = shlex.join([self.python, "-c", _BOOT])
        # Activation must not consume standard input, which carries the agent.
        script = f"{{ {self.activate}\n}} </dev/null && exec {command}" if self.activate else f"exec {command}"
        here = ["bash", "-c", script]
        words = ["ssh", *self.ssh_options, *_SSH, host.name, shlex.join(here)] if over_ssh else here
        try:
            # In a session of its own, because the launcher handles interrupts and must not cut off a host that is stopping.
            process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=False, start_new_session=True
            )
        except OSError as error:
            raise HostError(host.name, f"{words[0]} cannot be run here: {error}") from error
        running = set() if running is None else running
        running.add(process)
        try:
            out, error = process.communicate(sent, timeout=limit_s)
        except subprocess.TimeoutExpired as timeout:
            _kill(process)
            reason = f"no answer to {verb} within {limit_s:g} s; is the host overloaded, or its file system stuck?"
            raise HostError(host.name, reason) from timeout
        except BaseException:
            _kill(process)
            raise
        finally:
            running.discard(process)
        return _answer(host.name, verb, process.returncode, out.decode(errors="replace"), error.decode(errors="replace"), over_ssh)

    def call_all(
        self, verb: str, hosts: Sequence[Host], request: Callable[[Host], Mapping[str, Any]], limit_s: float
    ) -> dict[str, dict[str, Any] | HostError]:
        """Call all hosts at the same time; return each one's answer or error, by name."""

        running: set[subprocess.Popen] = set()

        def one(host: Host) -> dict[str, Any] | HostError:
            try:
                return self.call(verb, host, request(host), limit_s, running)
            except HostError as error:
                return error

        with ThreadPoolExecutor(max(1, min(128, len(hosts)))) as pool:
            try:
                return dict(zip([host.name for host in hosts], pool.map(one, hosts), strict=True))
            except BaseException:  # an interrupt does not wait for the hosts
                pool.shutdown(wait=False, cancel_futures=True)
                for process in tuple(running):
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                raise


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def is_this_machine(name: str) -> bool:
    """Return whether `name` is this machine, which needs no ssh. False for `user@host`, which requires another login."""
    if "@" in name:
        return False
    if name in ("localhost", os.uname().nodename):
        return True
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)}
    except OSError:  # perhaps an alias in ~/.ssh/config
        return False
    return any(map(_is_own_address, addresses))


def failures(answers: Mapping[str, dict[str, Any] | HostError]) -> list[HostError]:
    """Return the errors of the hosts that failed."""
    return [answer for answer in answers.values() if isinstance(answer, HostError)]


def split_ssh_options(words: str) -> tuple[str, ...]:
    """Split ssh's options, given as one argument, as a shell does. Raises UserError for an open quote."""
    try:
        return tuple(shlex.split(words))
    except ValueError as error:
        raise UserError(f"--ssh-options {words!r} cannot be split into words: {error}") from error


def _is_own_address(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as tried:
        try:
            tried.bind((address, 0))
        except OSError:
            return False
    return True


def _answer(host: str, verb: str, status: int, out: str, error: str, over_ssh: bool) -> dict[str, Any]:
    for line in reversed(out.splitlines()):
        if line.startswith(ANSWER):
            answer = json.loads(line.removeprefix(ANSWER))
            if "refused" in answer:
                raise HostError(host, answer["refused"])
            return answer
    lines = [line.rstrip() for line in (out + "\n" + error).splitlines() if line.strip() and not line.startswith(_NOISE)]
    last = "\n".join(lines[-_LINES:]) or "it printed nothing"
    # 255 is ssh's own status: the command did not run, or the connection broke.
    failed = (
        f"ssh cannot reach it, or the connection broke during {verb}"
        if over_ssh and status == 255
        else f"{verb} failed with status {status}"
    )
    raise HostError(host, f"{failed}:\n{last}")
