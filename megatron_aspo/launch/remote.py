"""Calls of the agent on hosts: over ssh, or directly where the host is this machine."""

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
"""No question is asked, and a host that vanishes is noticed after 15 s. They come last, as ssh takes the first value that it is given."""
_LINES = 20
_NOISE = (
    "** WARNING: connection is not using a post-quantum",
    "** This session may be vulnerable",
    "** The server may need to be upgraded",
)


class HostError(Exception):
    """A host could not do what it was asked to; carries its name and its last lines."""

    def __init__(self, host: str, reason: str):
        super().__init__(f"{host}: {reason}")
        self.host = host


@dataclass(frozen=True)
class Reach:
    """The way to the hosts, and their Python and directory; the same for start and stop."""

    directory: str
    """Directory for state on each host; `~` is its home directory."""
    python: str
    activate: str = ""
    """Shell command to run before Python."""
    ssh_options: tuple[str, ...] = ()

    def call(
        self, verb: str, host: Host, request: Mapping[str, Any], limit_s: float | None, running: set[subprocess.Popen] | None = None
    ) -> dict[str, Any]:
        """Let the host's agent do it, and return its answer. Raises HostError when it refuses, fails, cannot be reached or is too slow.

        limit_s: None is no limit. running: where the process of the call is noted while it lasts.
        """
        over_ssh = not is_this_machine(host.name)
        whole = {"verb": verb, "host": host.name, "directory": self.directory, "over_ssh": over_ssh, **request}
        agent = _AGENT.read_bytes()
        sent = b"%d\n" % len(agent) + agent + json.dumps(whole).encode()
        command = shlex.join([self.python, "-c", _BOOT])
        # Activation must not eat the agent, which is on standard input.
        script = f"{{ {self.activate}\n}} </dev/null && exec {command}" if self.activate else f"exec {command}"
        here = ["bash", "-c", script]
        words = ["ssh", *self.ssh_options, *_SSH, host.name, shlex.join(here)] if over_ssh else here
        try:
            # In a session of its own: an interrupt is ours to handle, and must not cut off a host that is told to stop.
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
        """Call all hosts at the same time; return, by name, each one's answer or what went wrong on it."""

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
    """Whether `name` is this machine; then no ssh is needed. `user@host` never is, as it asks for another login."""
    if "@" in name:
        return False
    if name in ("localhost", os.uname().nodename):
        return True
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)}
    except OSError:  # an alias of ~/.ssh/config, perhaps
        return False
    return any(map(_is_own_address, addresses))


def failures(answers: Mapping[str, dict[str, Any] | HostError]) -> list[HostError]:
    """The hosts that failed."""
    return [answer for answer in answers.values() if isinstance(answer, HostError)]


def split_ssh_options(words: str) -> tuple[str, ...]:
    """The options of ssh in one argument, as a shell would split them. Raises UserError when a quote is open."""
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
