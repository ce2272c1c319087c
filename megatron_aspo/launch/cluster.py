"""A Ray cluster over hosts: probe all of them, start missing nodes, wait until every node has joined, undo on failure.

The order matters: nothing is started before every host is reachable and suitable and its ports are free; the workers start together once
the head runs; any later failure ends exactly the nodes that this call started.
"""

import shlex
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_aspo.common.errors import UserError
from megatron_aspo.launch.hosts import Host, HostList
from megatron_aspo.launch.ports import PortMap
from megatron_aspo.launch.remote import HostError, Reach, failures

_PROBE_S = 60.0
_STOP_S = 60.0
_SLACK_S = 20.0
"""Seconds that a call may take beyond the limit that the agent sets itself."""


class LaunchError(Exception):
    """The cluster does not run; one line for each faulty host, with its last lines of output."""


@dataclass(frozen=True)
class ClusterSpec:
    """The requested cluster."""

    found: HostList
    ports: PortMap
    timeout_s: float
    token: str
    """Empty: no authentication."""
    num_cpus: int | None
    num_gpus: int | None
    object_store_bytes: int | None
    interface: str
    resources: dict[str, dict[str, int | None]]
    """Host → resource → amount; None means the host's slots, GPUs or CPUs."""
    environment: dict[str, str]
    dashboard: bool
    metrics: bool
    temp_dir: str


class Launch:
    """One call of start_ray.sh."""

    def __init__(self, spec: ClusterSpec, reach: Reach):
        self.spec, self.reach = spec, reach
        self._started_at = time.monotonic()
        self._attempted: list[Host] = []
        """Hosts on which this call has started, or tried to start, a node."""
        self._names: dict[str, str] = {}
        """Host → its node's name in the cluster."""

    def run(self) -> None:
        """Build or complete the cluster. Raises LaunchError when a host failed, UserError when the call must be changed."""
        try:
            self._run()
        except BaseException:
            self._undo()
            raise

    def block(self) -> int:
        """Wait until this host's node ends, then raise LaunchError with its last lines. An interrupt ends the node."""
        this = self.spec.found.hosts[-1]
        try:
            last = self.reach.call("follow", this, {}, None)["tail"]
        except BaseException:
            self._attempted = [this]
            self._undo()
            raise
        raise LaunchError(f"{this.name}: the node ended:\n{last}")

    def _run(self) -> None:
        found, ports = self.spec.found, self.spec.ports
        head, *workers = found.hosts
        here = found.hosts if found.rank is None else found.hosts[-1:]  # hosts whose nodes this call starts
        self._print("ports, the same on every host:\n" + "\n".join(ports.lines(self.spec.dashboard, self.spec.metrics)))
        state = self._probe(here)
        self._check_suitable(here, state)
        cluster, gcs = self._check_running(here, state)
        running = [host for host in here if state[host.name]["node"]]
        self._names = {host.name: state[host.name]["node"]["name"] for host in running}
        missing = [host for host in here if host not in running]
        if running and missing:
            self._print(f"{len(running)} of {len(here)} nodes run already; starting {', '.join(host.name for host in missing)}")
        self._check_ports(missing, state)
        if head in missing:
            cluster, gcs = uuid.uuid4().hex, f"{state[head.name]['address']}:{ports.base}"
            self._start([head], state, cluster, gcs)
        elif found.rank:
            gcs = f"{head.name}:{ports.base}"
            self._wait_for_port(head.name, ports.base)
        self._start([host for host in workers if host in missing], state, cluster, gcs)
        self._wait(here, gcs)
        self._print(
            f"already running: {found.count} nodes, nothing was started" if not missing else f"the cluster runs: {found.count} nodes"
        )
        self._print_usage(gcs, here[0])

    def _probe(self, hosts: Sequence[Host]) -> dict[str, dict[str, Any]]:
        def request(host: Host) -> dict[str, Any]:
            return {
                "interface": self.spec.interface,
                "peers": [other.name for other in self.spec.found.hosts if other != host],
                "ports": self.spec.ports.of(self._is_head(host)),
                "token": self.spec.token,
                "extras": ["--dashboard"] * self.spec.dashboard + ["--metrics"] * self.spec.metrics,
            }

        called = self.reach.call_all("probe", hosts, request, min(_PROBE_S, self.spec.timeout_s + _SLACK_S))
        answers = self._require_all(called, "nothing was started")
        for host in hosts:
            state = answers[host.name]
            self._print(
                f"{host.name}: {state['address']}, {state['cpus']} CPUs, {state['gpus']} GPUs, Ray {state['ray']} in {state['python']}"
            )
        return answers

    def _check_suitable(self, hosts: Sequence[Host], state: dict[str, dict[str, Any]]) -> None:
        versions = {host.name: state[host.name]["ray"] for host in hosts}
        if len(set(versions.values())) > 1:
            listing = ", ".join(f"{name} {version}" for name, version in versions.items())
            raise UserError(
                f"the hosts have several versions of Ray ({listing}), which cannot form a cluster; install one, or name it by --python"
            )
        addresses = [state[host.name]["address"] for host in hosts]
        for host in hosts:
            floor, last = state[host.name]["floor"], self.spec.ports.workers[1]
            if last >= floor:
                raise UserError(
                    f"ports {self.spec.ports.base} to {last} reach into {host.name}'s ephemeral range, which begins at {floor} "
                    "(net.ipv4.ip_local_port_range): any connection may take one; choose a lower --port"
                )
            if self.spec.found.count > 1 and state[host.name]["address"].startswith("127."):
                raise UserError(
                    f"{host.name} has only the address {state[host.name]['address']}, which other hosts cannot reach; name --interface"
                )
            if addresses.count(state[host.name]["address"]) > 1:
                raise UserError(f"two hosts of the list have the address {state[host.name]['address']}: a host may be named once only")

    def _check_running(self, hosts: Sequence[Host], state: dict[str, dict[str, Any]]) -> tuple[str, str]:
        """Return the running cluster's id and address, or empty strings. Raises UserError when it is not the requested one."""
        nodes = {host.name: state[host.name]["node"] for host in hosts if state[host.name]["node"]}
        if not nodes:
            return "", ""
        stop = "stop it first by tools/stop_ray.sh"
        head = self.spec.found.hosts[0].name
        if self.spec.found.rank is None and head not in nodes:
            raise UserError(
                f"nodes run on {', '.join(nodes)}, but the head {head} has none: they cannot be adopted by another head; {stop}"
            )
        one = next(iter(nodes.values()))
        for name, node in nodes.items():
            if node["cluster"] != one["cluster"]:
                raise UserError(f"the node on {name} belongs to another cluster than the one on {next(iter(nodes))}; {stop}")
            if node["port"] != self.spec.ports.base:
                raise UserError(
                    f"the cluster on {name} runs at port {node['port']}, not {self.spec.ports.base}; name it by --port, or {stop}"
                )
            if not state[name]["same_token"]:
                raise UserError(f"the cluster on {name} runs with another token; name its file by --token-file, or {stop}")
        return one["cluster"], one["gcs"]

    def _check_ports(self, hosts: Sequence[Host], state: dict[str, dict[str, Any]]) -> None:
        taken = []
        for host in hosts:
            ports = self.spec.ports.of(self._is_head(host))
            busy = {"gcs" if name == "port" else name.removesuffix("-port"): ports[name] for name in state[host.name]["busy"]}
            taken += [f"{host.name}: port {port} ({server}) is in use" for server, port in busy.items()]
        if taken:
            raise LaunchError(
                "; ".join(taken) + ". Nothing was started. Another cluster of yours, or another user's? See who by ss -ltnp on that host, "
                f"or choose other ports, such as --port {self.spec.ports.base + 1000}"
            )

    def _start(self, hosts: Sequence[Host], state: dict[str, dict[str, Any]], cluster: str, gcs: str) -> None:
        if not hosts:
            return
        self._print(f"starting {', '.join(host.name for host in hosts)}")
        self._attempted += hosts
        limit_s = self._remaining_s()

        def request(host: Host) -> dict[str, Any]:
            head = self._is_head(host)
            return {
                "cluster": cluster,
                "gcs": gcs,
                "role": "head" if head else "worker",
                "port": self.spec.ports.base,
                "token": self.spec.token,
                "temp_dir": self.spec.temp_dir,
                "environment": self.spec.environment | {"RAY_enable_metrics_collection": "1" if self.spec.metrics else "0"},
                "arguments": self._arguments(host, state[host.name], gcs),
                "timeout_s": limit_s,
            }

        called = self.reach.call_all("start", hosts, request, limit_s + _SLACK_S)
        answers = self._require_all(called, "what this call started is ended again")
        self._names |= {name: answer["name"] for name, answer in answers.items()}

    def _arguments(self, host: Host, state: dict[str, Any], gcs: str) -> list[str]:
        """Return the options of `ray start`."""
        spec, head = self.spec, self._is_head(host)
        slots = host.slots or (state["gpus"] if spec.num_gpus is None else spec.num_gpus) or spec.num_cpus or state["cpus"]
        resources = {name: slots if amount is None else amount for name, amount in spec.resources[host.name].items()}
        words = [f"--node-ip-address={state['address']}", f"--temp-dir={spec.temp_dir}", "--disable-usage-stats", "--log-style=record"]
        if head:
            # The monitor belongs to the autoscaler, which has nothing to scale here; it would serve metrics on all interfaces, to anyone.
            words += ["--head", "--no-monitor", f"--include-dashboard={str(spec.dashboard).lower()}", "--dashboard-host=127.0.0.1"]
        else:
            words.append(f"--address={gcs}")
        if resources:
            words.append("--resources={" + ",".join(f'"{name}":{amount}' for name, amount in resources.items()) + "}")
        for option, value in (
            ("num-cpus", spec.num_cpus),
            ("num-gpus", spec.num_gpus),
            ("object-store-memory", spec.object_store_bytes),
        ):
            if value is not None:
                words.append(f"--{option}={value}")
        return words + spec.ports.arguments(head)

    def _wait(self, hosts: Sequence[Host], gcs: str) -> None:
        """Wait until the nodes of all hosts are alive in the cluster, and the cluster has its full number of nodes."""
        observer = hosts[0]  # the head, unless each node makes its own call
        limit_s = self._remaining_s()
        request = {
            "gcs": gcs,
            "names": list(self._names.values()),
            "count": self.spec.found.count,
            "timeout_s": limit_s,
            "token": self.spec.token,
        }
        try:
            called = {observer.name: self.reach.call("wait_for_nodes", observer, request, limit_s + _SLACK_S)}
        except HostError as error:
            called = {observer.name: error}
        answer = self._require_all(called, "what this call started is ended again")[observer.name]
        late = [host for host in hosts if self._names[host.name] in answer["missing"]]
        if late:
            lines = []
            for name, status in self.reach.call_all("status", late, lambda host: {}, _PROBE_S).items():
                if isinstance(status, HostError):
                    lines.append(str(status))
                else:
                    runs = "its node runs, but is not alive in the cluster" if status["alive"] else "its node ended"
                    lines.append(f"{name}: {runs}; its last lines:\n{status['tail']}")
            problem = f"; the head answered: {answer['problem']}" if answer["problem"] else ""
            raise LaunchError(f"not joined within {self.spec.timeout_s:g} s{problem}. " + "\n".join(lines))
        if answer["missing"] or answer["alive"] < self.spec.found.count:
            joined = f"{answer['alive']} of {self.spec.found.count} nodes"
            raise LaunchError(f"{joined} joined within {self.spec.timeout_s:g} s; look at the others' output")

    def _wait_for_port(self, name: str, port: int) -> None:
        """Wait until something listens on the port: the head makes its own call, perhaps later than this one."""
        while True:
            try:
                socket.create_connection((name, port), timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() - self._started_at > self.spec.timeout_s:
                    raise LaunchError(f"{name}: nothing listens at port {port} within {self.spec.timeout_s:g} s: {error}") from error
            time.sleep(0.5)

    def _undo(self) -> None:
        if not self._attempted:
            return
        answers = self.reach.call_all("stop", self._attempted, lambda host: {}, _STOP_S)
        if left := [error.host for error in failures(answers)]:
            self._print(f"could not be told to end its node: {', '.join(left)}; run tools/stop_ray.sh when it can be reached")

    def _require_all(self, answers: Mapping[str, dict[str, Any] | HostError], then: str) -> dict[str, dict[str, Any]]:
        """Return the answers. Raises LaunchError if a host failed."""
        if failed := failures(answers):
            raise LaunchError("\n".join(map(str, failed)) + f"\n{len(failed)} of {len(answers)} hosts failed; {then}")
        return {name: answer for name, answer in answers.items() if not isinstance(answer, HostError)}

    def _is_head(self, host: Host) -> bool:
        return not self.spec.found.rank and host == self.spec.found.hosts[0]

    def _remaining_s(self) -> float:
        return max(1.0, self.spec.timeout_s - (time.monotonic() - self._started_at))

    def _print(self, what: str) -> None:
        print(f"[{time.monotonic() - self._started_at:6.1f} s] {what}", flush=True)

    def _print_usage(self, gcs: str, host: Host) -> None:
        if self.spec.token:
            token = f"{self.reach.directory}/nodes/{host.name}/token"
            print(f"  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}   # on {host.name}; on the others by their names")
        print(f"  megatron-aspo train RECIPE.yaml --ray-address {gcs}")
        if self.spec.dashboard:
            print(f"  dashboard: http://127.0.0.1:{self.spec.ports.on_the_head['dashboard-port']} on the head")
        print(f"  bash tools/stop_ray.sh --dir {shlex.quote(self.reach.directory)}   # ends exactly this", flush=True)
