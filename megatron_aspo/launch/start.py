"""tools/start_ray.sh: parse the options, find the hosts, and build the cluster of `cluster.py`."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence

from megatron_aspo.common.auth_token import find_token
from megatron_aspo.common.errors import UserError
from megatron_aspo.launch.cluster import ClusterSpec, Launch, LaunchError
from megatron_aspo.launch.hosts import Host, HostList, choose_hosts, find_hosts
from megatron_aspo.launch.options import Record, add_common, make_reach
from megatron_aspo.launch.ports import PortMap

_DESCRIPTION = """Build a Ray cluster over hosts and wait until every node has joined. Safe to run twice: on a running cluster it says
so, and starts the nodes that are missing. Ends with status 0 when the whole cluster runs, 1 when a host failed (what this call started
is ended again), 2 for a mistake in the call. docs/cluster.md shows a first cluster."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    parser = _parser()
    parsed = parser.parse_args(arguments)
    try:
        found = find_hosts(parsed.hostfile, os.environ)
        print(f"hosts: {found.source}: {found.count}, head {found.hosts[0].name}", flush=True)
        launch = _launch(parsed, found)
        launch.run()
        Record(found.hosts if found.rank is None else found.hosts[-1:], launch.reach).write()
        if parsed.block:
            return launch.block()
    except UserError as error:
        print(f"start_ray.sh: error: {error}", file=sys.stderr)
        return 2
    except LaunchError as error:
        print(f"start_ray.sh: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        print("start_ray.sh: interrupted; what this call had started is ended", file=sys.stderr)
        return 128 + number
    return 0


def _interrupt(number: int, frame) -> None:
    raise KeyboardInterrupt(number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="start_ray.sh", description=_DESCRIPTION)
    add_common(parser)
    parser.add_argument("--port", type=int, default=6379, help="the head's; the cluster takes the 1000 ports from there (default 6379)")
    parser.add_argument("--timeout", type=float, default=180.0, metavar="S", help="seconds until all nodes must have joined (default 180)")
    parser.add_argument("--num-cpus", type=int, metavar="N", help="logical CPUs of each node; default: its cores")
    parser.add_argument("--num-gpus", type=int, metavar="N", help="GPUs of each node; default: those that Ray finds")
    parser.add_argument(
        "--object-store-mb", type=int, metavar="MB", help="Ray's object store on each node; default: Ray's, 30%% of the memory"
    )
    parser.add_argument("--interface", default="", metavar="NAME", help="network interface whose IPv4 address each node uses, such as ib0")
    parser.add_argument(
        "--resources",
        action="append",
        default=[],
        metavar="NAME[:AMOUNT]=HOSTS",
        help="custom resource of a group of hosts, such as trainers:8=1-2 or graders=host3,host4; the amount by default: the host's slots, "
        "else its GPUs, else its CPUs; may be repeated",
    )
    parser.add_argument(
        "--export", action="append", default=[], metavar="NAME[=VALUE]", help="environment variable for the nodes; repeated"
    )
    parser.add_argument("--token-file", default="", metavar="PATH", help="default: RAY_AUTH_TOKEN_PATH, else DIR/token, made if missing")
    parser.add_argument("--no-token", action="store_true", help="no authentication: whoever reaches the ports can run programs as you")
    parser.add_argument("--dashboard", action="store_true", help="Ray's dashboard, on the head's loopback interface")
    parser.add_argument("--metrics", action="store_true", help="Ray's Prometheus endpoint on each node; it asks for no token")
    parser.add_argument("--temp-dir", default="", metavar="PATH", help="Ray's sessions on each host (default /tmp/ray-USERID-PORT)")
    parser.add_argument("--block", action="store_true", help="stay until this host's node ends, as a pod needs it; a signal ends the node")
    return parser


def _launch(parsed: argparse.Namespace, found: HostList) -> Launch:
    """Return the launch that the options describe. Raises UserError for invalid options."""
    for name in ("num_cpus", "num_gpus", "object_store_mb"):
        value = getattr(parsed, name)
        if value is not None and value < (name == "object_store_mb"):
            raise UserError(f"--{name.replace('_', '-')} {value} is too small")
    if parsed.timeout <= 0:
        raise UserError(f"--timeout {parsed.timeout:g} is not above 0 seconds")
    if parsed.block and found.rank is None and len(found.hosts) > 1:
        raise UserError("--block is for one host: with several, start_ray.sh leaves the nodes running and returns; stop_ray.sh ends them")
    token = ""
    if not parsed.no_token:
        alone = found.rank is None or found.count == 1
        token, path = find_token(parsed.token_file, parsed.dir, os.environ, make=alone)
        print(f"token: {path}", flush=True)
    else:
        print("token: none. Whoever reaches the ports of the cluster can run programs as you", flush=True)
    spec = ClusterSpec(
        found=found,
        ports=PortMap(parsed.port),
        timeout_s=parsed.timeout,
        token=token,
        num_cpus=parsed.num_cpus,
        num_gpus=parsed.num_gpus,
        object_store_bytes=parsed.object_store_mb and parsed.object_store_mb << 20,
        interface=parsed.interface,
        resources=_resources(parsed.resources, found),
        environment=_exported(parsed.export),
        dashboard=parsed.dashboard,
        metrics=parsed.metrics,
        temp_dir=parsed.temp_dir or f"/tmp/ray-{os.getuid()}-{parsed.port}",
    )
    return Launch(spec, make_reach(parsed))


def parse_resources(given: Sequence[str], hosts: Sequence[Host]) -> dict[str, dict[str, int | None]]:
    """Return each host's custom resources with their amounts; None means the default amount. Raises UserError."""
    found: dict[str, dict[str, int | None]] = {host.name: {} for host in hosts}
    for words in given:
        match = re.fullmatch(r"([A-Za-z_]\w*)(?::(\d+))?=(.+)", words)
        if not match:
            raise UserError(f"--resources {words} is not understood; write NAME=HOSTS or NAME:AMOUNT=HOSTS, such as trainers:8=1-2")
        if match[1] in ("CPU", "GPU", "memory", "object_store_memory"):
            raise UserError(f"--resources {words}: {match[1]} is Ray's own; use another name, or --num-cpus and --num-gpus")
        for position in choose_hosts(match[3], hosts):
            found[hosts[position].name][match[1]] = int(match[2]) if match[2] else None
    return found


def _resources(given: Sequence[str], found: HostList) -> dict[str, dict[str, int | None]]:
    if found.rank is None:
        return parse_resources(given, found.hosts)
    # This call knows the numbers of the other nodes, but not their names.
    numbered = [Host(f"node {number}") for number in range(1, found.count + 1)]
    return {found.hosts[-1].name: parse_resources(given, numbered)[numbered[found.rank].name]}


def _exported(given: Sequence[str]) -> dict[str, str]:
    exported = {}
    for words in given:
        name, equals, value = words.partition("=")
        if not equals and name not in os.environ:
            raise UserError(f"--export {name}: the variable is not set here; set it, or give its value as {name}=VALUE")
        exported[name] = value if equals else os.environ[name]
    return exported


if __name__ == "__main__":
    sys.exit(main())
