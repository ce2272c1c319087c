"""Sandboxes of a worker that runs as root: they start as `nobody`, and see the interpreter even if that user cannot read root's home.

With root's user id, even without any privilege, a program would own all of root's files that it sees, and have no limit on processes.
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
    """A private mount namespace, invisible to the rest of the machine, in which the files are at paths that `nobody` can reach.

    The kernel drops it with its last user, so that nothing has to be undone.
    """

    def __init__(self, paths: list[str], program: str):
        """Raises UserError if this root may not mount, as in most containers, and for missing system programs.

        program: the program that is started in the namespace, where it must stay visible.
        """
        if missing := [name for name in _PROGRAMS if shutil.which(name) is None]:
            raise UserError(
                f"the code sandbox, as root, needs {' and '.join(missing)}, not found on PATH; install util-linux (apt install util-linux "
                "mount, dnf install util-linux), or run as another user"
            )
        point = next(point for point in _MOUNT_POINTS if os.path.isdir(point) and not os.path.realpath(program).startswith(f"{point}/"))
        self.staged = {path: f"{point}/{number}" for number, path in enumerate(paths)}
        # Filled in a fresh directory, which hides no file, then moved to the mount point: a worker that is killed leaves nothing behind.
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
            assert process.stdin is not None and process.stdout is not None and process.stderr is not None  # pipes
            if process.stdout.readline() != b"ready\n":
                process.kill()
                why = " ".join(process.stderr.read().decode().split())
                raise UserError(f"the code sandbox may not mount here as root ({why}); allow it (CAP_SYS_ADMIN), or run as another user")
            namespace = os.open(f"/proc/{process.pid}/ns/mnt", os.O_RDONLY)
            process.stdin.close()
            return namespace

    def prefix(self) -> list[str]:
        """Return the prefix of a command line that makes it run as `nobody` in the namespace."""
        # The descriptor is named by its path in this process: an inherited one would be open in the sandbox.
        return ["nsenter", f"--mount=/proc/{os.getpid()}/fd/{self._namespace}", f"--setuid={NOBODY}", f"--setgid={NOBODY}", "--"]

    def close(self) -> None:
        os.close(self._namespace)
