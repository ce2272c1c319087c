"""One rehearsal from `start_ray.sh` to `stop_ray.sh`: gives the commands on the hosts, each in a shell, and waits for what they leave."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.launching import environment
from tests.hosts import ROOT, Hosts
from tools.rehearsal.commands import HEAD, OTHER, Commands
from tools.rehearsal.faults import Fault, strike, wait_until

_ENDED_S = 30.0
"""Time that processes have to end after the last command, before they count as left behind."""
VARIABLES = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class Session:
    """A user's terminals on the hosts. Outputs go to files in the rehearsal's directory."""

    hosts: Hosts
    commands: Commands

    def rehearse(self, faults: Sequence[Fault]) -> int:
        """Give all commands. Returns how many processes were left on the hosts. Raises RuntimeError if one fails."""
        commands = self.commands
        commands.runs.mkdir(parents=True)
        printed = self.call(HEAD, commands.start_ray())
        address, token = re.search(r"--ray-address (\S+)", printed)[1], re.search(r"RAY_AUTH_TOKEN_PATH=(\S+)", printed)[1]
        background: list[subprocess.Popen] = []
        try:
            watchers = [self.begin(OTHER, commands.generate(), "generate"), self.begin(HEAD, commands.grade(), "grade")]
            background += watchers
            self.call(HEAD, commands.plan())
            trains = self.begin(HEAD, commands.train(address, token), "train")
            background.append(trains)
            for fault in faults:
                strike(fault, self.hosts, commands.run, self.output("train"), lambda: trains.poll() is None)
            if trains.wait():
                raise RuntimeError(f"the training ended with status {trains.returncode}: {self.tail('train')}")
            wanted = self.commands.sizes.steps // self.commands.sizes.checkpoint_every
            wait_until(lambda: self.evaluated() == wanted, lambda: all(one.poll() is None for one in watchers), f"{wanted} evaluations")
        finally:
            for process in background:
                end(process)
        self.call(HEAD, commands.merge())
        self.call(OTHER, commands.evaluate_merged())
        self.call(HEAD, commands.stop_ray())
        return self.left()

    def evaluated(self) -> int:
        """Return the number of checkpoints in the table."""
        path = self.commands.run / "evaluations" / self.commands.subject.task / "results.csv"
        return len(list(csv.DictReader(path.open(encoding="utf-8")))) if path.exists() else 0

    def call(self, host: int, text: str) -> str:
        """Run a command to its end, and return its standard output. Raises RuntimeError if it fails."""
        print(f"host{host}$ {text}", flush=True)
        words = self.hosts.command(host, ["bash", "-c", f"cd {ROOT} && {text}"])
        done = subprocess.run(words, env=environment(**VARIABLES), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"status {done.returncode} of: {text}\n{(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    def begin(self, host: int, text: str, name: str) -> subprocess.Popen:
        """Start a command in a session of its own."""
        print(f"host{host}$ {text} &", flush=True)
        words = self.hosts.command(host, ["bash", "-c", f"cd {ROOT} && {text}"])
        with self.output(name).open("w") as file:
            variables = environment(**VARIABLES)
            return subprocess.Popen(
                words, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def output(self, name: str) -> Path:
        """Return the file with what a command printed."""
        return self.commands.place / f"{name}.log"

    def tail(self, name: str) -> str:
        """Return the last lines of it."""
        return self.output(name).read_text(encoding="utf-8", errors="replace")[-3000:]

    def left(self) -> int:
        """Return the number of processes on the hosts that do not end."""
        deadline = time.monotonic() + _ENDED_S
        while (left := [pid for host in self.hosts.numbers for pid in self.hosts.processes(host)]) and time.monotonic() < deadline:
            time.sleep(0.5)
        for pid in left:
            print(f"--- left: {Path(f'/proc/{pid}/cmdline').read_bytes()[:200]}", flush=True)
        return len(left)


def end(process: subprocess.Popen) -> None:
    """End a command with all that it started in the foreground, and wait for it. Not by SIGINT, which background jobs of a shell ignore."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    process.wait()
