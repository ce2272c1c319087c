"""Sandboxes of a worker that is root: they start as `nobody`, and see the interpreter even where that user may not read root's home.

With root's user id, even without any privilege, a program would own all files of root that it sees, and have no limit on processes.
"""

import os
import shutil
import subprocess
import tempfile

from megatron_aspo.common.errors import UserError

NOBODY = 65534
_MOUNT_POINTS = ("/mnt", "/media", "/srv")
_PROGRAMS = ("unshare", "nsenter", "mount")


class Staging:
    """A mount namespace of our own, not seen by the machine, in which the files lie where `nobody` can reach them.

    The kernel drops it with its last user: nothing has to be undone.
    """

    def __init__(self, paths: list[str], program: str):
        """Raises UserError if this root may not mount, as in most containers, and for programs of the system that are missing.

        program: the one that is started in the namespace; it stays visible there.
        """
        if missing := [name for name in _PROGRAMS if shutil.which(name) is None]:
            raise UserError(
                f"the code sandbox, as root, needs {' and '.join(missing)}, not found on PATH; install util-linux (apt install util-linux "
                "mount, dnf install util-linux), or run as another user"
            )
        point = next(point for point in _MOUNT_POINTS if os.path.isdir(point) and not os.path.realpath(program).startswith(f"{point}/"))
        self.staged = {path: f"{point}/{number}" for number, path in enumerate(paths)}
        # Filled on a fresh directory, which hides no file, and only then moved to where it may: a worker that is killed leaves nothing.
        with tempfile.TemporaryDirectory(prefix="megatron_aspo-") as directory:
            self._namespace = self._stage(directory, point)

    def _stage(self, directory: str, point: str) -> int:
        """Return a descriptor of a new mount namespace in which the files are staged."""
        lines = [f"mount -t tmpfs -o mode=755 tmpfs '{directory}'"]
        for path, target in self.staged.items():
            target = f"'{directory}/{os.path.basename(target)}'"
            lines.append(f'{"mkdir" if os.path.isdir(path) else "touch"} {target} && mount --bind "${{{len(lines)}}}" {target}')
        script = "\n".join([*lines, f"mount --move '{directory}' {point}", "echo ready; read end || true"])
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh", *self.staged]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            if process.stdout.readline() != b"ready\n":
                process.kill()
                why = " ".join(process.stderr.read().decode().split())
                raise UserError(f"the code sandbox may not mount here as root ({why}); allow it (CAP_SYS_ADMIN), or run as another user")
            namespace = os.open(f"/proc/{process.pid}/ns/mnt", os.O_RDONLY)
            process.stdin.close()
            return namespace

    def prefix(self) -> list[str]:
        """The beginning of a command line that then runs as `nobody` where the files are."""
        # Our own descriptor by its path: one that is passed on would be open in the sandbox.
        return ["nsenter", f"--mount=/proc/{os.getpid()}/fd/{self._namespace}", f"--setuid={NOBODY}", f"--setgid={NOBODY}", "--"]

    def close(self) -> None:
        os.close(self._namespace)
