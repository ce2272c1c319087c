"""A Slurm of two nodes on this machine: its own munge, controller and node daemons, with separate files, ports and sockets."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")


def missing() -> str:
    """Return why no Slurm can be started here; empty when one can."""
    absent = [name for name in PROGRAMS if find(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: apt install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "the node daemons of Slurm need root"


def find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@dataclass(frozen=True)
class Slurm:
    """Slurm's commands, as a user gives them."""

    directory: Path

    def run(self, *words: str, cwd: Path | None = None, **variables: str) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RAY_"))}
        environment = kept | {"SLURM_CONF": str(self.directory / "slurm.conf")} | variables
        return subprocess.run(words, env=environment, cwd=cwd, check=True, capture_output=True, text=True, timeout=60).stdout

    def job(self, number: str) -> dict[str, str]:
        """Return state, exit code, restarts and so on of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number)))

    def wait(self, number: str, condition, what: str, limit_s: float = 300.0) -> dict[str, str]:
        """Return the job as soon as the condition holds for it."""
        deadline = time.monotonic() + limit_s
        while not condition(job := self.job(number)):
            assert time.monotonic() < deadline, f"{what} did not happen in {limit_s:g} s; {job}"
            time.sleep(0.5)
        return job


@contextmanager
def two_nodes(directory: Path) -> Iterator[Slurm]:
    """Slurm nodes n1 and n2, ready for jobs; every daemon is ended afterwards."""
    controller, first, second = free_ports(3)
    key = directory / "munge.key"
    key.write_bytes(secrets.token_bytes(64))
    key.chmod(0o600)
    host = socket.gethostname().split(".")[0]
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={os.cpu_count()} State=UNKNOWN"
        for name, port in (("n1", first), ("n2", second))
    )
    (directory / "slurm.conf").write_text(f"""
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until the credentials expire.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=1,batch_sched_delay=1
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdSpoolDir={directory}/%n
SlurmdPidFile={directory}/%n.pid
SlurmdLogFile={directory}/%n.log
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
    for name in ("state", "n1", "n2"):
        (directory / name).mkdir()
    configured = ["-f", str(directory / "slurm.conf")]
    files = [f"--{name}-file={directory}/munged.{name}" for name in ("pid", "log", "seed")]
    daemons = [
        # --force, because its directories are below /tmp, which others can write.
        ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={directory}/munge.socket", *files],
        ["slurmctld", "-D", *configured],
        *(["slurmd", "-D", "-N", name, *configured] for name in ("n1", "n2")),
    ]
    with ExitStack() as running:
        for program, *words in daemons:
            with (directory / f"{program}.out").open("a") as out:
                process = subprocess.Popen([find(program), *words], stdout=out, stderr=out, start_new_session=True)
            running.callback(end, process)
            time.sleep(1)
        slurm = Slurm(directory)
        deadline = time.monotonic() + 60
        while len(re.findall(r"State=IDLE", shown(slurm))) < 2:
            assert time.monotonic() < deadline, f"{shown(slurm)}\n{(directory / 'slurmctld.log').read_text()[-2000:]}"
            time.sleep(0.5)
        yield slurm


def shown(slurm: Slurm) -> str:
    try:
        return slurm.run("scontrol", "show", "node")
    except subprocess.CalledProcessError as error:  # the controller is still starting
        return error.stderr


def end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
