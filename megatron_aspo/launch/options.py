"""Command-line options shared by start and stop, and the launcher's record of a cluster."""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_aspo.common.errors import UserError
from megatron_aspo.launch.hosts import Host
from megatron_aspo.launch.remote import Reach, split_ssh_options

DEFAULT_DIRECTORY = "~/.megatron_aspo/ray"


@dataclass(frozen=True)
class Record:
    """A cluster that was started from this machine, recorded so that it can be stopped without naming its hosts again."""

    hosts: tuple[Host, ...]
    reach: Reach

    @staticmethod
    def path(directory: str) -> Path:
        """Return the path of the record of the clusters of `--dir`."""
        return Path(directory).expanduser() / "cluster.json"

    def write(self) -> None:
        """Write the record whole or not at all."""
        path = self.path(self.reach.directory)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")
        unfinished.replace(path)

    @classmethod
    def read(cls, directory: str) -> "Record | None":
        """Return the record, or None if there is none. Raises UserError if it is malformed."""
        path = cls.path(directory)
        if not path.exists():
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            reach = kept["reach"] | {"ssh_options": tuple(kept["reach"]["ssh_options"])}
            return cls(tuple(Host(**host) for host in kept["hosts"]), Reach(**reach))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} cannot be read: {error}; remove it, and name the hostfile") from error


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the hostfile and the options of host access. They have no defaults here, because `stop` takes them from the record."""
    parser.add_argument(
        "hostfile", nargs="?", default="", metavar="HOSTFILE", help="one host a line, the head first; default: Slurm's, MPI's or the pod's"
    )
    parser.add_argument("--ssh-options", metavar="WORDS", help="options of ssh in one argument, such as '-p 2222 -i key'")
    parser.add_argument("--python", metavar="PATH", help="Python on the hosts; default: this one, or with --env the first on PATH")
    parser.add_argument("--env", metavar="COMMAND", help="shell command that activates the environment on the hosts")
    parser.add_argument(
        "--dir",
        default=DEFAULT_DIRECTORY,
        metavar="PATH",
        help=f"state on each host: token, process ids, output (default {DEFAULT_DIRECTORY})",
    )


def make_reach(parsed: argparse.Namespace, kept: Reach | None = None) -> Reach:
    """Return how hosts are reached: by the given options, else as in the kept record."""
    kept = kept or Reach(parsed.dir, "python3" if parsed.env else sys.executable)
    return Reach(
        parsed.dir,
        parsed.python or ("python3" if parsed.env else kept.python),
        kept.activate if parsed.env is None else parsed.env,
        kept.ssh_options if parsed.ssh_options is None else split_ssh_options(parsed.ssh_options),
    )
