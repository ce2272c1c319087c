"""A Ray cluster over hosts: look at all of them, start what is missing, wait until every node has joined, undo on failure.

The order matters: nothing is started before every host was reached, found fit and its ports free; the workers start at the same time once
the head runs; and whatever goes wrong after that ends exactly the nodes that this call started.
"""

import shlex
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_aspo.common.errors import UserError
from megatron_aspo.launch.hosts import Found, Host
from megatron_aspo.launch.ports import PortMap
from megatron_aspo.launch.remote import HostError, Reach, failures

_PROBE_S = 60.0
_STOP_S = 60.0
_SLACK_S = 20.0
"""Seconds that a call may take beyond the limit that the agent gives itself."""


class LaunchError(Exception):
    """The cluster does not run; one line for each host at fault, with its last lines of output."""


@dataclass(frozen=True)
class Wanted:
    """The cluster that is asked for."""

    found: Found
    ports: PortMap
    timeout_s: float
    token: str
    """Empty: no authentication."""
    num_cpus: int | None
    num_gpus: int | None
    object_store_bytes: int | None
    interface: str
    resources: dict[str, dict[str, int | None]]
    """Host → resource → amount; None stands for the host's slots, GPUs or CPUs."""
    environment: dict[str, str]
    dashboard: bool
    metrics: bool
    temp_dir: str


class Launch:
    """One call of start_ray.sh."""

    def __init__(self, wanted: Wanted, reach: Reach):
        self.wanted, self.reach = wanted, reach
        self._started_at = time.monotonic()
        self._begun: list[Host] = []
        """Hosts on which this call started a node, or tried to."""
        self._names: dict[str, str] = {}
        """Host → name of its node in the cluster."""

    def run(self) -> None:
        """Build the cluster or complete it. Raises LaunchError when a host failed, UserError when the call must be another one."""
        try:
            self._run()
        except BaseException:
            self._undo()
            raise

    def block(self) -> int:
        """Return 1 when this host's node has ended; a signal ends it."""
        this = self.wanted.found.hosts[-1]
        try:
            last = self.reach.call("follow", this, {}, None)["tail"]
        except BaseException:
            self._begun = [this]
            self._undo()
            raise
        raise LaunchError(f"{this.name}: the node ended:\n{last}")

    def _run(self) -> None:
        found, ports = self.wanted.found, self.wanted.ports
        head, *workers = found.hosts
        here = found.hosts if found.rank is None else found.hosts[-1:]  # nodes that are this call's to start
        self._say("ports, the same on every host:\n" + "\n".join(ports.lines(self.wanted.dashboard, self.wanted.metrics)))
        state = self._probe(here)
        self._check_fit(here, state)
        cluster, gcs = self._check_running(here, state)
        running = [host for host in here if state[host.name]["node"]]
        self._names = {host.name: state[host.name]["node"]["name"] for host in running}
        missing = [host for host in here if host not in running]
        if running and missing:
            self._say(f"{len(running)} of {len(here)} nodes run already; starting {', '.join(host.name for host in missing)}")
        self._check_ports(missing, state)
        if head in missing:
            cluster, gcs = uuid.uuid4().hex, f"{state[head.name]['address']}:{ports.base}"
            self._start([head], state, cluster, gcs)
        elif found.rank:
            gcs = f"{head.name}:{ports.base}"
            self._wait_for_port(head.name, ports.base)
        self._start([host for host in workers if host in missing], state, cluster, gcs)
        self._wait(here, gcs)
        self._say(f"already running: {found.count} nodes, nothing was started" if not missing else f"the cluster runs: {found.count} nodes")
        self._say_how_to_use(gcs, here[0])

    def _probe(self, hosts: Sequence[Host]) -> dict[str, dict[str, Any]]:
        def request(host: Host) -> dict[str, Any]:
            return {
                "interface": self.wanted.interface,
                "peers": [other.name for other in self.wanted.found.hosts if other != host],
                "ports": self.wanted.ports.of(self._is_head(host)),
                "token": self.wanted.token,
                "extras": ["--dashboard"] * self.wanted.dashboard + ["--metrics"] * self.wanted.metrics,
            }

        answers = self.reach.call_all("probe", hosts, request, min(_PROBE_S, self.wanted.timeout_s + _SLACK_S))
        self._raise_failures(answers, "nothing was started")
        for host in hosts:
            state = answers[host.name]
            self._say(
                f"{host.name}: {state['address']}, {state['cpus']} CPUs, {state['gpus']} GPUs, Ray {state['ray']} in {state['python']}"
            )
        return answers

    def _check_fit(self, hosts: Sequence[Host], state: dict[str, dict[str, Any]]) -> None:
        versions = {host.name: state[host.name]["ray"] for host in hosts}
        if len(set(versions.values())) > 1:
            told = ", ".join(f"{name} {version}" for name, version in versions.items())
            raise UserError(
                f"the hosts have several versions of Ray ({told}), which cannot form a cluster; install one, or name it by --python"
            )
        addresses = [state[host.name]["address"] for host in hosts]
        for host in hosts:
            floor, last = state[host.name]["floor"], self.wanted.ports.workers[1]
            if last >= floor:
                raise UserError(
                    f"ports {self.wanted.ports.base} to {last} reach into {host.name}'s ephemeral range, which begins at {floor} "
                    "(net.ipv4.ip_local_port_range): any connection may take one; choose a lower --port"
                )
            if self.wanted.found.count > 1 and state[host.name]["address"].startswith("127."):
                raise UserError(
                    f"{host.name} has only the address {state[host.name]['address']}, which other hosts cannot reach; name --interface"
                )
            if addresses.count(state[host.name]["address"]) > 1:
                raise UserError(f"two hosts of the list have the address {state[host.name]['address']}: a host may be named once only")

    def _check_running(self, hosts: Sequence[Host], state: dict[str, dict[str, Any]]) -> tuple[str, str]:
        """Return the running cluster and its address, or empty words. Raises UserError when it is not the one that is asked for."""
        nodes = {host.name: state[host.name]["node"] for host in hosts if state[host.name]["node"]}
        if not nodes:
            return "", ""
        stop = "stop it first by tools/stop_ray.sh"
        head = self.wanted.found.hosts[0].name
        if self.wanted.found.rank is None and head not in nodes:
            raise UserError(
                f"nodes run on {', '.join(nodes)}, but the head {head} has none: they cannot be adopted by another head; {stop}"
            )
        one = next(iter(nodes.values()))
        for name, node in nodes.items():
            if node["cluster"] != one["cluster"]:
                raise UserError(f"the node on {name} belongs to another cluster than the one on {next(iter(nodes))}; {stop}")
            if node["port"] != self.wanted.ports.base:
                raise UserError(
                    f"the cluster on {name} runs at port {node['port']}, not {self.wanted.ports.base}; name it by --port, or {stop}"
                )
            if not state[name]["same_token"]:
                raise UserError(f"the cluster on {name} runs with another token; name its file by --token-file, or {stop}")
        return one["cluster"], one["gcs"]

    def _check_ports(self, hosts: Sequence[Host], state: dict[str, dict[str, Any]]) -> None:
        taken = []
        for host in hosts:
            ports = self.wanted.ports.of(self._is_head(host))
            busy = {"gcs" if name == "port" else name.removesuffix("-port"): ports[name] for name in state[host.name]["busy"]}
            taken += [f"{host.name}: port {port} ({server}) is in use" for server, port in busy.items()]
        if taken:
            raise LaunchError(
                "; ".join(taken) + ". Nothing was started. Another cluster of yours, or another user's? See who by ss -ltnp on that host, "
                f"or choose other ports, such as --port {self.wanted.ports.base + 1000}"
            )

    def _start(self, hosts: Sequence[Host], state: dict[str, dict[str, Any]], cluster: str, gcs: str) -> None:
        if not hosts:
            return
        self._say(f"starting {', '.join(host.name for host in hosts)}")
        self._begun += hosts
        limit_s = self._left_s()

        def request(host: Host) -> dict[str, Any]:
            head = self._is_head(host)
            return {
                "cluster": cluster,
                "gcs": gcs,
                "role": "head" if head else "worker",
                "port": self.wanted.ports.base,
                "token": self.wanted.token,
                "temp_dir": self.wanted.temp_dir,
                "environment": self.wanted.environment | {"RAY_enable_metrics_collection": "1" if self.wanted.metrics else "0"},
                "arguments": self._arguments(host, state[host.name], gcs),
                "timeout_s": limit_s,
            }

        answers = self.reach.call_all("start", hosts, request, limit_s + _SLACK_S)
        self._raise_failures(answers, "what this call started is ended again")
        self._names |= {name: answer["name"] for name, answer in answers.items()}

    def _arguments(self, host: Host, state: dict[str, Any], gcs: str) -> list[str]:
        """The options of `ray start`."""
        wanted, head = self.wanted, self._is_head(host)
        slots = host.slots or (state["gpus"] if wanted.num_gpus is None else wanted.num_gpus) or wanted.num_cpus or state["cpus"]
        resources = {name: slots if amount is None else amount for name, amount in wanted.resources[host.name].items()}
        words = [f"--node-ip-address={state['address']}", f"--temp-dir={wanted.temp_dir}", "--disable-usage-stats", "--log-style=record"]
        if head:
            # The monitor is the autoscaler's, which has nothing to scale here; it would serve metrics on all interfaces, to anyone.
            words += ["--head", "--no-monitor", f"--include-dashboard={str(wanted.dashboard).lower()}", "--dashboard-host=127.0.0.1"]
        else:
            words.append(f"--address={gcs}")
        if resources:
            words.append("--resources={" + ",".join(f'"{name}":{amount}' for name, amount in resources.items()) + "}")
        for option, value in (
            ("num-cpus", wanted.num_cpus),
            ("num-gpus", wanted.num_gpus),
            ("object-store-memory", wanted.object_store_bytes),
        ):
            if value is not None:
                words.append(f"--{option}={value}")
        return words + wanted.ports.arguments(head)

    def _wait(self, hosts: Sequence[Host], gcs: str) -> None:
        """Return when the nodes of all hosts are alive in the cluster, and as many as there are to be."""
        asked = hosts[0]  # on the head, unless each node makes its own call
        limit_s = self._left_s()
        request = {
            "gcs": gcs,
            "names": list(self._names.values()),
            "count": self.wanted.found.count,
            "timeout_s": limit_s,
            "token": self.wanted.token,
        }
        try:
            answer = self.reach.call("joined", asked, request, limit_s + _SLACK_S)
        except HostError as error:
            self._raise_failures({asked.name: error}, "what this call started is ended again")
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
            raise LaunchError(f"not joined within {self.wanted.timeout_s:g} s{problem}. " + "\n".join(lines))
        if answer["missing"] or answer["alive"] < self.wanted.found.count:
            joined = f"{answer['alive']} of {self.wanted.found.count} nodes"
            raise LaunchError(f"{joined} joined within {self.wanted.timeout_s:g} s; look at the others' output")

    def _wait_for_port(self, name: str, port: int) -> None:
        """Return when something listens there: the head makes its own call, perhaps later than this one."""
        while True:
            try:
                socket.create_connection((name, port), timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() - self._started_at > self.wanted.timeout_s:
                    raise LaunchError(f"{name}: nothing listens at port {port} within {self.wanted.timeout_s:g} s: {error}") from error
            time.sleep(0.5)

    def _undo(self) -> None:
        if not self._begun:
            return
        answers = self.reach.call_all("stop", self._begun, lambda host: {}, _STOP_S)
        if left := [error.host for error in failures(answers)]:
            self._say(f"could not be told to end its node: {', '.join(left)}; run tools/stop_ray.sh when it can be reached")

    def _raise_failures(self, answers: dict[str, dict[str, Any] | HostError], then: str) -> None:
        if failed := failures(answers):
            raise LaunchError("\n".join(map(str, failed)) + f"\n{len(failed)} of {len(answers)} hosts failed; {then}")

    def _is_head(self, host: Host) -> bool:
        return not self.wanted.found.rank and host == self.wanted.found.hosts[0]

    def _left_s(self) -> float:
        return max(1.0, self.wanted.timeout_s - (time.monotonic() - self._started_at))

    def _say(self, what: str) -> None:
        print(f"[{time.monotonic() - self._started_at:6.1f} s] {what}", flush=True)

    def _say_how_to_use(self, gcs: str, host: Host) -> None:
        if self.wanted.token:
            token = f"{self.reach.directory}/nodes/{host.name}/token"
            print(f"  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}   # on {host.name}; on the others by their names")
        print(f"  megatron-aspo train RECIPE.yaml --ray-address {gcs}")
        if self.wanted.dashboard:
            print(f"  dashboard: http://127.0.0.1:{self.wanted.ports.on_the_head['dashboard-port']} on the head")
        print(f"  bash tools/stop_ray.sh --dir {shlex.quote(self.reach.directory)}   # ends exactly this", flush=True)
