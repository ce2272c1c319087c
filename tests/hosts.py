"""Several "hosts" on one machine, for tests of what runs over many nodes.

Each host has its own network, PID, mount, UTS and IPC namespaces, /tmp, /dev/shm, /run and home directory, and sshd as its process 1.
They are attached to a bridge in a separate network namespace, so that the machine's interfaces, routes and firewall stay untouched. No
namespace has a name: each disappears with its processes, which end with the test's process, however that ends.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
_UP_S = 20.0


def why_not() -> str:
    """Return why hosts cannot be made on this machine (the kernel or the container forbids it); empty when they can."""
    if os.geteuid() != 0:
        return "hosts are made of namespaces, which needs root"
    if shutil.which("ip") is None:
        return "hosts are made by ip, which is not installed: apt install iproute2"
    name = f"aspo-probe-{os.getpid()}"
    added = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if added.returncode:
        return f"ip netns add does not work here: {added.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


class Hosts:
    """`count` hosts, from 10.77.0.1 on, that can log in to each other. Use it as a context manager.

    directory: outside /tmp and the home directory, since hosts have their own; every host sees it. visible: other paths that they see.
    """

    def __init__(self, directory: Path, count: int, visible: Sequence[Path] = ()):
        self.directory = directory
        self.addresses = [f"10.77.0.{number}" for number in range(1, count + 1)]
        self.numbers = range(1, count + 1)
        self.hostfile = directory / "hostfile"
        self._visible = [Path(sys.base_prefix), Path(sys.prefix).resolve(), ROOT, directory, *visible]
        self._processes: dict[int, subprocess.Popen] = {}
        self._lan: subprocess.Popen | None = None

    def __enter__(self) -> "Hosts":
        try:
            self._up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.down()

    @property
    def ssh_options(self) -> str:
        """Options of ssh for the launcher."""
        known = f"-o UserKnownHostsFile={self.directory}/known_hosts -o StrictHostKeyChecking=yes"
        return f"-F none -i {self.directory}/key -o IdentitiesOnly=yes {known}"

    def command(self, host: int, words: Sequence[str], user: int = 0) -> list[str]:
        """Return the command that runs `words` on a host, numbered from 1, as the user with this number."""
        as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
        return ["nsenter", "-t", str(self.pid(host)), "-n", "-p", "-m", "-u", "-i", *as_user, "--", *words]

    def popen(self, host: int, *words: str, user: int = 0, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> subprocess.Popen:
        """Start a command on a host."""
        return subprocess.Popen(
            self.command(host, ["sh", "-c", 'cd "$0" && exec "$@"', str(cwd), *words], user),
            env=dict(env or os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, host: int, *words: str, timeout_s: float = 120, **how) -> subprocess.CompletedProcess:
        """Run a command on a host to its end."""
        process = self.popen(host, *words, **how)
        try:
            out, error = process.communicate(timeout=timeout_s)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(words, process.returncode, out, error)

    def is_up(self, host: int) -> bool:
        """Whether the host was made and has not been killed since."""
        return host in self._processes

    def pid(self, host: int) -> int:
        """Return the pid of the host's process 1 on this machine."""
        (pid,) = _children(self._processes[host].pid)
        return pid

    def processes(self, host: int) -> list[int]:
        """Return the pids on this machine of all processes of a host, except its first."""
        space = os.stat(f"/proc/{self.pid(host)}/ns/pid").st_ino
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.stat(f"/proc/{name}/ns/pid").st_ino == space and Path(f"/proc/{name}/cmdline").read_bytes():
                    found.append(int(name))
            except OSError:  # it ended
                continue
        return [pid for pid in found if pid != self.pid(host)]

    def kill(self, host: int) -> None:
        """Kill a host's process 1, and with it everything that runs on the host."""
        os.kill(self.pid(host), signal.SIGKILL)
        self._processes.pop(host).wait()
        # The kernel removes the link later, and the host may be made again before that.
        self._in_lan("sh", "-c", f"ip link del veth{host} 2>/dev/null || true")

    def boot(self, host: int) -> None:
        """Make a host, or make it again after `kill`."""
        host_directory = self.directory / f"host{host}"
        host_directory.mkdir(exist_ok=True)
        log = (host_directory / "log").open("ab")
        space = ["unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--mount-proc", "--kill-child"]
        self._processes[host] = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *space, "bash", "-euc", self._init(host)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        self._wait(host, lambda: (host_directory / "ready").exists(), "its namespaces")
        (host_directory / "ready").unlink()
        pid = self.pid(host)
        end = f"veth{host}"
        # The same hardware address each time, because the others remember it.
        inside = ["name", "eth0", "address", f"02:77:00:00:00:{host:02x}", "netns", str(pid)]
        self._in_lan("ip", "link", "add", end, "type", "veth", "peer", *inside)
        self._in_lan("ip", "link", "set", end, "master", "br0", "up")
        (host_directory / "plugged").touch()
        self._wait(host, lambda: not Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"bash"), "sshd")
        (host_directory / "plugged").unlink()
        self._wait(host, lambda: self.run(host, "ss", "-Hltn", "sport = :22").stdout, "sshd's port")

    def down(self) -> None:
        """End everything. Idempotent."""
        for host in list(self._processes):
            process = self._processes.pop(host)
            for pid in _children(process.pid) or [process.pid]:
                os.kill(pid, signal.SIGKILL)
            process.wait()
        if self._lan:
            self._lan.kill()
            self._lan.wait()
            self._lan = None

    def _up(self) -> None:
        sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if sshd is None:
            raise RuntimeError("the hosts of the tests need sshd: bash tools/maintain/setup_hosts.sh installs it on Debian and Ubuntu")
        self._sshd = sshd
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in ("key", "other_key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.directory / name], check=True)
        host_key = " ".join((self.directory / "host_key.pub").read_text().split()[:2])
        (self.directory / "known_hosts").write_text("".join(f"{address} {host_key}\n" for address in self.addresses))
        self.hostfile.write_text("# the head first\n" + "".join(f"{address} slots=2\n" for address in self.addresses))
        self._lan = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", "unshare", "--net", "--", "sleep", "infinity"],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        own = os.readlink("/proc/self/ns/net")
        deadline = time.monotonic() + _UP_S
        while os.readlink(f"/proc/{self._lan.pid}/ns/net") == own:
            assert time.monotonic() < deadline and self._lan.poll() is None
            time.sleep(0.01)
        self._in_lan("ip", "link", "add", "br0", "type", "bridge")
        self._in_lan("ip", "link", "set", "br0", "up")
        for host in self.numbers:
            self.boot(host)

    def _init(self, host: int) -> str:
        """Return the shell script that is a host's process 1 until it becomes sshd."""
        host_directory = shlex.quote(str(self.directory / f"host{host}"))
        own = {Path.home(): "size=64m,mode=755", Path("/tmp"): "size=4g,mode=1777"}
        kept = [path for path in self._visible if any(path.is_relative_to(directory) for directory in own)]
        # These directories are private to the host; needed paths of the machine inside them are mounted back.
        binds = [f"mkdir -p /run/kept/{n} && mount --bind {shlex.quote(str(path))} /run/kept/{n}" for n, path in enumerate(kept)]
        binds += [f"mount -t tmpfs -o {options} tmpfs {shlex.quote(str(directory))}" for directory, options in own.items()]
        binds += [f"mkdir -p {(at := shlex.quote(str(path)))} && mount --bind /run/kept/{n} {at}" for n, path in enumerate(kept)]
        settings = {
            "ListenAddress": self.addresses[host - 1],
            "HostKey": f"{self.directory}/host_key",
            "AuthorizedKeysFile": f"{self.directory}/key.pub",
            "PidFile": "none",
            "UsePAM": "no",
            "StrictModes": "no",
            "PasswordAuthentication": "no",
            "MaxStartups": "100",
        }
        (self.directory / f"host{host}/sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        return "\n".join(
            [
                f"hostname host{host}",
                "mount -t tmpfs -o size=2g,mode=1777 tmpfs /dev/shm",
                "mount -t tmpfs -o size=64m,mode=755 tmpfs /run",
                *binds,
                "mkdir -p /run/sshd",
                "ip link set lo up",
                f"touch {host_directory}/ready",
                f"until [[ -e {host_directory}/plugged ]]; do sleep 0.02; done",
                f"ip addr add {self.addresses[host - 1]}/24 dev eth0",
                "ip link set eth0 up",
                f"exec {self._sshd} -D -e -f {host_directory}/sshd_config",
            ]
        )

    def _in_lan(self, *words: str) -> None:
        subprocess.run(["nsenter", "-t", str(self._lan.pid), "-n", "--", *words], check=True)

    def _wait(self, host: int, condition, what: str) -> None:
        deadline = time.monotonic() + _UP_S
        while not condition():
            if time.monotonic() > deadline or self._processes[host].poll() is not None:
                raise RuntimeError(f"host {host}: no {what}: {(self.directory / f'host{host}/log').read_text()}")
            time.sleep(0.02)


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
