"""tools/stop_ray.sh: end the Ray nodes that tools/start_ray.sh started, and nothing else."""

import argparse
import os
import sys

from megatron_aspo.common.errors import UserError
from megatron_aspo.launch.hosts import find_hosts
from megatron_aspo.launch.options import Record, add_common, make_reach
from megatron_aspo.launch.remote import failures

_LIMIT_S = 60.0


def main(arguments: list[str] | None = None) -> int:
    """Return 0 when no host runs the cluster any more, 1 when one was unreachable or failed, 2 for a mistake in the call."""
    parser = argparse.ArgumentParser(
        prog="stop_ray.sh",
        description="End exactly the processes that start_ray.sh started, on all hosts. Safe to run twice. Without a hostfile: the hosts "
        "of the last start from this machine, or those of the environment.",
    )
    add_common(parser)
    parsed = parser.parse_args(arguments)
    try:
        record = Record.read(parsed.dir)
        if record and not parsed.hostfile:
            hosts, rank = record.hosts, None
        else:
            found = find_hosts(parsed.hostfile, os.environ)
            hosts, rank = found.hosts, found.rank
        reach = make_reach(parsed, record.reach if record else None)
    except UserError as error:
        print(f"stop_ray.sh: error: {error}", file=sys.stderr)
        return 2
    if rank is not None:
        hosts = hosts[-1:]  # each node makes its own call
    answers = reach.call_all("stop", hosts, lambda host: {}, _LIMIT_S)
    for name, answer in answers.items():
        if isinstance(answer, dict):
            print(f"{name}: " + (f"ended {answer['ended']} processes" if answer["ended"] else "nothing of ours was running"))
    failed = failures(answers)
    for error in failed:
        print(f"stop_ray.sh: error: {error}", file=sys.stderr)
    if failed:
        names = ", ".join(error.host for error in failed)
        print(f"stop_ray.sh: error: not known to be stopped: {names}; run this again when they can be reached", file=sys.stderr)
        return 1
    if record and {host.name for host in hosts} >= {host.name for host in record.hosts}:
        Record.path(parsed.dir).unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
