"""Where the worker is root: sandboxes start as the user `nobody`, and see the interpreter even where that user may not read root's home.

With root's user id, even without any privilege, a program would own all files of root that it sees, and have no limit on processes.
"""

import os
import subprocess

from megatron_aspo.errors import UserError

NOBODY = 65534
_MOUNT_POINT = "/mnt"


class Staging:
    """A mount namespace of our own, not seen by the machine, in which the files lie where `nobody` can reach them.

    The kernel drops it with its last user: nothing has to be undone.
    """

    def __init__(self, paths: list[str]):
        """Raises UserError if this root may not mount, as in most containers."""
        self.staged = {path: f"{_MOUNT_POINT}/{number}" for number, path in enumerate(paths)}
        lines = [f"mount -t tmpfs -o mode=755 tmpfs {_MOUNT_POINT}"]
        for path, target in self.staged.items():
            lines.append(f'{"mkdir" if os.path.isdir(path) else "touch"} {target} && mount --bind "${{{len(lines)}}}" {target}')
        script = "\n".join([*lines, "echo ready; read end || true"])
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh", *self.staged]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            if process.stdout.readline() != b"ready\n":
                process.kill()
                why = " ".join(process.stderr.read().decode().split())
                raise UserError(f"the code sandbox may not mount here as root ({why}); allow it (CAP_SYS_ADMIN), or run as another user")
            self._namespace = os.open(f"/proc/{process.pid}/ns/mnt", os.O_RDONLY)
            process.stdin.close()

    @property
    def descriptors(self) -> list[int]:
        return [self._namespace]

    def prefix(self) -> list[str]:
        """The beginning of a command line that then runs as `nobody` where the files are."""
        return ["nsenter", f"--mount=/proc/self/fd/{self._namespace}", f"--setuid={NOBODY}", f"--setgid={NOBODY}", "--"]

    def close(self) -> None:
        os.close(self._namespace)
