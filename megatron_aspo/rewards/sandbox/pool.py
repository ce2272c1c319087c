"""A pool of clean waiting sandboxes, so that a program does not wait for an interpreter to start."""

import threading
from collections import deque

from megatron_aspo.common.errors import UserError
from megatron_aspo.rewards.sandbox.launcher import Launcher
from megatron_aspo.rewards.sandbox.options import Limits, SandboxOptions
from megatron_aspo.rewards.sandbox.sandbox import Sandbox, SandboxError

_TRIES = 3


class SandboxPool:
    """`options.pool` waiting sandboxes. `take` one for each program and `kill` it afterwards. The pool is thread-safe, but the kernel kills
    a sandbox when the thread that started it ends.
    """

    def __init__(self, options: SandboxOptions, limits: Limits):
        """Start the sandboxes, and run one to its end. Raises UserError, with the cure, for what this machine lacks."""
        self._limits = limits
        self._size = max(1, options.pool)
        self._launcher = Launcher(options, limits)
        self._waiting: deque[Sandbox] = deque()
        self._lock = threading.Lock()
        try:
            check_modules(self.take(), options.modules)
        except SandboxError as error:
            self.close()
            raise UserError(f"the code sandbox does not start here ({error}){_cure(error)}") from error
        except BaseException:
            self.close()
            raise

    def take(self) -> Sandbox:
        """Return a clean sandbox, and start a replacement. Raises SandboxError if none starts in three tries."""
        for tries in range(1, _TRIES + 1):
            sandbox = None
            try:
                with self._lock:
                    # One more than wait afterwards: the one to take.
                    while len(self._waiting) <= self._size:
                        self._waiting.append(self._start())
                    sandbox = self._waiting.popleft()
                sandbox.wait_until_ready()
                return sandbox
            except SandboxError:
                if sandbox:
                    sandbox.kill()
                if tries == _TRIES:
                    raise
        raise AssertionError("unreachable")

    def _start(self) -> Sandbox:
        try:
            return Sandbox(self._launcher, self._limits)
        except OSError as error:
            raise SandboxError(f"no process or control group can be made: {error}") from error

    def close(self) -> None:
        """Kill the waiting sandboxes. Idempotent."""
        with self._lock:
            while self._waiting:
                self._waiting.popleft().kill()
            self._launcher.close()


def _cure(error: SandboxError) -> str:
    """Return the permissions that the machine or container must grant, and the alternative if they are forbidden."""
    if not str(error).startswith("bwrap:"):
        return ""
    if "mount proc" in str(error):
        allow = (
            "the container hides parts of /proc, which keeps sandboxes in it from having their own: start it with --security-opt "
            "systempaths=unconfined (docker), --security-opt unmask=ALL (podman) or procMount: Unmasked (Kubernetes)"
        )
    else:
        allow = (
            "bubblewrap needs user namespaces, allow them: sysctl kernel.unprivileged_userns_clone=1 (Debian), "
            "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), --security-opt seccomp=unconfined (containers); in a chroot there "
            "are none"
        )
    return f"; {allow}. Or grade on another machine, by data.reward=remote and megatron-aspo grade-server"


def check_modules(sandbox: Sandbox, modules: list[str]) -> None:
    """Import the promised modules in the sandbox, then kill it. Raises UserError naming one that cannot be imported there."""
    try:
        for module in modules or ["sys"]:
            sandbox.load({"program": f"import {module}"})
            outcome = sandbox.run("stdin", b"", 60.0)
            if outcome.ended != "exit" or outcome.status != 0:
                why = outcome.error.strip().splitlines()[-1:] or [outcome.ended]
                raise UserError(
                    f"the module {module} cannot be imported in the code sandbox ({why[0]}); add what it needs to modules, or raise "
                    "memory_mb"
                )
    finally:
        sandbox.kill()
