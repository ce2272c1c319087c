"""The command that starts a sandbox, and the check that this machine supports it."""

import contextlib
import os
import py_compile
import re
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_aspo.common.errors import UserError
from megatron_aspo.rewards.sandbox import cgroup, syscalls
from megatron_aspo.rewards.sandbox.interpreter import AGENT, AGENT_INSIDE, MODULES_INSIDE, find_interpreter
from megatron_aspo.rewards.sandbox.options import Limits, SandboxOptions
from megatron_aspo.rewards.sandbox.staging import NOBODY, Staging

INSTALL_BUBBLEWRAP = "install bubblewrap 0.8 or newer (Debian, Ubuntu: apt install bubblewrap; Fedora, RHEL: dnf install bubblewrap)"
AGENT_MEMORY_BYTES = 64 << 20
"""Memory of a sandbox beyond its program's: the waiting interpreter, and bubblewrap."""
OWN_PROCESSES = 4
"""Processes of a sandbox beyond its program's: bubblewrap twice, the agent, and the shell that enters the control group."""
PYTHON_FLAGS = ("-S", "-s", "-P", "-B", "-X", "utf8")
_PROGRAM = ("-c", "__import__('agent').main()")
_ENVIRONMENT = {
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PATH": "/usr/bin:/bin",
    # A verdict must not depend on the order of a set of strings.
    "PYTHONHASHSEED": "0",
    "TMPDIR": "/tmp",
}


class Launcher:
    """Starts sandboxes with the same options and limits. The constructor raises UserError for what this machine lacks."""

    def __init__(self, options: SandboxOptions, limits: Limits):
        if options.kind == "none" and not options.accept_risk:
            raise UserError(
                "sandbox kind=none runs programs of the model with all that this user may do; set accept_risk: true beside it, or "
                "kind: bubblewrap"
            )
        self.contained = options.kind == "bubblewrap"
        self._limits = limits
        self._modules = options.modules
        self._bubblewrap = find_bubblewrap() if self.contained else ""
        self._interpreter = find_interpreter(options.modules, options.paths)
        _compile_agent()
        self._staging: Staging | None = None
        self._filter = -1
        self._cgroup_parents: list[Path] = []
        if self.contained:
            self._cgroup_parents = cgroup.find_parents()
            if not self._cgroup_parents and not self.counts_processes:
                raise UserError(
                    f"the code sandbox cannot limit processes here: Linux {os.uname().release} counts them for a user, not for a sandbox, "
                    "and no control groups can be made; use Linux 5.14 or newer, or delegate a control group to this user (systemd: "
                    "Delegate=yes)"
                )
            self._filter = syscalls.make_filter()
            if os.geteuid() == 0:
                self._staging = Staging([outside for outside, _ in self._interpreter.files], self._bubblewrap)

    @property
    def user(self) -> int | None:
        """The user id of a sandbox's processes on this machine; None if it is this process's."""
        return NOBODY if self._staging else None

    @property
    def counts_processes(self) -> bool:
        """Whether RLIMIT_NPROC counts only the sandbox's processes, instead of all those of its user on this machine."""
        return self.contained and kernel_version(os.uname().release) >= (5, 14)

    def make_cgroup(self) -> cgroup.Cgroup | None:
        """Return a new control group for one sandbox, or None where this machine has none to use. Raises OSError if making it fails."""
        if not self._cgroup_parents:
            return None
        limits = self._limits
        return cgroup.Cgroup(self._cgroup_parents, (limits.memory_mb << 20) + AGENT_MEMORY_BYTES, limits.processes + OWN_PROCESSES)

    def start(self, control: int, info: int, group: cgroup.Cgroup | None, directory: str) -> subprocess.Popen:
        """Start a sandbox whose agent has the socket `control` as standard input; bubblewrap writes to the pipe `info`.

        directory: the working directory if there is no sandbox. The standard error of the process is a pipe.
        """
        if not self.contained:
            return self._start_uncontained(control, directory)
        # Opened again for an independent offset, because bubblewrap reads the filter to its end.
        seccomp = os.open(f"/proc/self/fd/{self._filter}", os.O_RDONLY)
        command = [*(group.prefix() if group else ()), *(self._staging.prefix() if self._staging else ()), self._bubblewrap]
        command += [*self._arguments(), "--seccomp", str(seccomp), "--info-fd", str(info), "--"]
        command += [self._interpreter.executable, *PYTHON_FLAGS, *_PROGRAM]
        try:
            return subprocess.Popen(
                command,
                stdin=control,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[info, seccomp],
                # Not the worker's environment, which may hold keys: the sandbox's first process is bubblewrap, whose environment is
                # readable inside.
                env={"PATH": os.defpath},
            )
        finally:
            os.close(seccomp)

    def _arguments(self) -> list[str]:
        arguments = ["--unshare-user", "--disable-userns", "--unshare-pid", "--unshare-ipc", "--unshare-net", "--unshare-uts"]
        arguments += ["--unshare-cgroup", "--hostname", "sandbox", "--new-session", "--die-with-parent", "--cap-drop", "ALL", "--clearenv"]
        modules = MODULES_INSIDE if self._modules else ""
        for name, value in (_ENVIRONMENT | {"PYTHONPATH": AGENT_INSIDE, "SANDBOX_MODULES": modules}).items():
            arguments += ["--setenv", name, value]
        size = str(self._limits.file_mb << 20)
        arguments += ["--proc", "/proc", "--dev", "/dev", "--size", size, "--tmpfs", "/dev/shm", "--size", size, "--tmpfs", "/tmp"]
        # After /tmp, because a path that programs may read can be below it.
        for outside, inside in self._interpreter.files:
            arguments += ["--ro-bind", self._staging.staged[outside] if self._staging else outside, inside]
        for path in ("/proc", "/dev", "/"):
            arguments += ["--remount-ro", path]
        return [*arguments, "--chdir", "/tmp"]

    def _start_uncontained(self, control: int, directory: str) -> subprocess.Popen:
        paths = [path for path in sys.path if path.endswith("site-packages")] if self._modules else []
        environment = _ENVIRONMENT | {"HOME": directory, "TMPDIR": directory}
        environment |= {"PYTHONPATH": str(AGENT), "SANDBOX_MODULES": ":".join(paths), "SANDBOX_ADOPTS_ORPHANS": "1"}
        return subprocess.Popen(
            [self._interpreter.executable, *PYTHON_FLAGS, *_PROGRAM],
            stdin=control,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=directory,
            start_new_session=True,
        )

    def close(self) -> None:
        """Release the filter and the staged files; no sandbox can be started afterwards. Idempotent."""
        if self._filter >= 0:
            os.close(self._filter)
        if self._staging:
            self._staging.close()
        self._filter, self._staging = -1, None


def kernel_version(release: str) -> tuple[int, int]:
    """Return the first two numbers of a kernel release as printed by `uname -r`, such as `5.14.0-362.el9.x86_64`; zeros if none."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _compile_agent() -> None:
    """Compile the agent's modules once, if their directory is writable; else each sandbox compiles them, in 10 ms."""
    for path in AGENT.glob("*.py"):
        with contextlib.suppress(OSError):
            py_compile.compile(str(path), doraise=True)


def find_bubblewrap() -> str:
    """Return the path of a suitable bubblewrap. Raises UserError naming what to install."""
    path = shutil.which("bwrap")
    if path is None:
        raise UserError(f"the code sandbox needs bubblewrap, and there is no bwrap on PATH; {INSTALL_BUBBLEWRAP}")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers < (0, 8):
        raise UserError(f"{path} is {version.strip() or 'of an unknown version'}, which cannot close user namespaces; {INSTALL_BUBBLEWRAP}")
    return path
