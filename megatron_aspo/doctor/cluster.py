"""The checks of a Ray cluster: each node alone, then the nodes together. Runs in a child process of the command."""

import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from megatron_aspo.common.errors import UserError
from megatron_aspo.config import Config
from megatron_aspo.doctor.agreement import compare_nodes
from megatron_aspo.doctor.calls import describe_failure, gather
from megatron_aspo.doctor.clock import judge_skew, measure_skew
from megatron_aspo.doctor.links import Phase, try_links
from megatron_aspo.doctor.needs import NodeContext, RunNeeds
from megatron_aspo.doctor.pairs import pair_rounds
from megatron_aspo.doctor.probe import LinkEnd, NodeProbe
from megatron_aspo.doctor.recipe import NodeCapacity, check_placement
from megatron_aspo.doctor.record import Record, broken, failed, ok, refused, warning
from megatron_aspo.doctor.storage import existing_parent
from megatron_aspo.runtime.cluster import open_cluster

_CLOCK_S = 10.0
_PORTS = {"NodeManagerPort": "node manager", "ObjectManagerPort": "object manager", "MetricsExportPort": "metrics"}
JOIN_CURE = (
    "see on the head node whether it runs there (ray status), and that this machine has its address and port open, its versions of Ray and "
    "Python, and its token (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH)"
)


@dataclass(frozen=True)
class Node:
    """A live node of the cluster."""

    id: str
    context: NodeContext
    resources: dict[str, float]


class ClusterDoctor:
    """Checks a cluster by `examine`. The constructor joins it and raises UserError if it cannot."""

    def __init__(self, address: str, needs: RunNeeds, config: Config | None, bandwidth_s: float, limit_s: float, hide: bool, phase: Phase):
        """limit_s: limit of each check on a node. phase: called before each part of the work, with its name and time limit.

        hide: remove secrets and user names from the records of other nodes, on those nodes.
        """
        self._needs, self._config, self._bandwidth_s, self._limit_s = needs, config, bandwidth_s, limit_s
        self._hide, self._phase = hide, phase
        phase("joining the Ray cluster", 2 * limit_s)
        self._cluster = open_cluster(address, 0)
        self._driver = ray.get_runtime_context().get_node_id()
        self.nodes = live_nodes(self._driver)

    def close(self) -> None:
        self._cluster.close()

    def examine(self) -> Iterator[Record]:
        """Yield the records of all checks. Nodes that do not answer are named and excluded from the later checks."""
        lost = [node for node in ray.nodes() if not node["Alive"]]
        detail = f"{len(self.nodes)} nodes, computes on {self._cluster.device}, {self._cluster.slots} devices"
        if lost:
            names = ", ".join(sorted({node["NodeManagerAddress"] for node in lost}))
            cure = "nothing, if they were stopped on purpose; else read raylet.out and gcs_server.out in Ray's logs"
            yield warning("Ray cluster", f"{detail}; nodes that left: {names}", cure)
        else:
            yield ok("Ray cluster", detail)
        probes = yield from self._start(NodeProbe, "starting a process on each node", "Ray process")
        yield from self._check_nodes(probes)
        yield from self._check_clocks(probes)
        if self._config is not None:
            yield self._check_placement(self._config)
            yield from self._check_shared_directory(probes)
        yield from self._check_links(probes)

    def _start(self, kind: type, phase: str, check: str) -> Generator[Record, None, dict]:
        """Start an actor on each node; yield a failure for each that does not start, and return the others by label."""
        limit_s = 2 * self._limit_s
        self._phase(phase, limit_s)
        actors = {node.context.label: start_on(node.id, kind, {}) for node in self.nodes}
        answers, failures = gather({label: actor.ready.remote() for label, actor in actors.items()}, limit_s)
        for label, error in failures.items():
            yield replace(unresponsive_node(check, label, error, limit_s), node=label)
        return {label: actors[label] for label in answers}

    def _check_nodes(self, probes: dict) -> Iterator[Record]:
        limit_s = self._limit_s + 10
        self._phase("checking each node", limit_s)
        contexts = {node.context.label: node.context for node in self.nodes}
        calls = {label: probe.check.remote(self._needs, contexts[label], self._limit_s, self._hide) for label, probe in probes.items()}
        answers, failures = gather(calls, limit_s)
        for records in answers.values():
            yield from records
        for label, error in failures.items():
            probes.pop(label)
            yield replace(unresponsive_node("Ray process", label, error, limit_s), node=label)
        yield from compare_nodes(answers, self._driver_label)
        for node in self.nodes:
            if record := check_gpus_of_ray(node.resources, answers.get(node.context.label, [])):
                yield replace(record, node=node.context.label)

    def _check_clocks(self, probes: dict) -> Iterator[Record]:
        self._phase("comparing clocks", _CLOCK_S * (len(probes) + 1))
        for label, probe in list(probes.items()):
            try:
                yield replace(judge_skew(*measure_skew(lambda probe=probe: ray.get(probe.now.remote(), timeout=_CLOCK_S / 5))), node=label)
            except RayError as error:
                probes.pop(label)
                yield replace(unresponsive_node("clock", label, error, _CLOCK_S), node=label)

    def _check_placement(self, config: Config) -> Record:
        self._phase("checking the recipe", 2 * self._limit_s)
        kind = "GPU" if self._cluster.device == "cuda" else "CPU"
        capacities = [NodeCapacity(int(node.resources.get(kind, 0)), node.resources) for node in self.nodes]
        try:
            record = check_placement(config, self._cluster.device, capacities)
        except UserError as error:
            return refused("placement", error)
        except Exception as error:  # the connections still have to be checked
            return broken("placement", error)
        total, free = (int(found.get(kind, 0)) for found in (ray.cluster_resources(), ray.available_resources()))
        if record.status == "ok" and free < total:
            cure = "wait until the other job has ended, or give this run a cluster of its own"
            return warning("placement", f"{record.detail}; {total - free} of them are in use", cure)
        return record

    def _check_shared_directory(self, probes: dict) -> Iterator[Record]:
        """Check that all nodes see a file that this process writes beside the run directory."""
        if len(probes) < 2:
            return
        self._phase("looking for a file on each node", self._limit_s + 5)
        directory = existing_parent(self._needs.directory)
        try:
            with tempfile.NamedTemporaryFile(prefix=".megatron-aspo-doctor-", dir=directory) as canary:
                answers, failures = gather({label: probe.sees.remote(Path(canary.name)) for label, probe in probes.items()}, self._limit_s)
        except OSError:
            return  # reported by the check of the run directory
        for label, seen in answers.items():
            record = ok("shared directory", f"{directory} is the same on all nodes")
            if not seen:
                detail = f"{directory} is another one than on {self._driver_label}: training ranks there would not find the run directory"
                record = failed("shared directory", detail, "choose a run_dir on a file system that all nodes share")
            yield replace(record, node=label)
        for label, error in failures.items():
            yield replace(unresponsive_node("shared directory", label, error, self._limit_s), node=label)

    def _check_links(self, probes: dict) -> Iterator[Record]:
        self.nodes = [node for node in self.nodes if node.context.label in probes]
        if len(self.nodes) > 1:
            ends = yield from self._start(LinkEnd, "importing torch on each node", "gloo")
            yield from try_links(ends, pair_rounds([*ends]), self._bandwidth_s, "gloo", self._phase)
            for end in ends.values():
                ray.kill(end)
        yield from self._check_gpu_links()

    def _check_gpu_links(self) -> Iterator[Record]:
        """Check NCCL between one GPU of each node, and between two GPUs of a node that has them."""
        gpus = {node.context.label: int(node.resources.get("GPU", 0)) for node in self.nodes}
        wanted = [(f"{label} GPU {index}", label) for label, count in gpus.items() for index in range(min(2, count))]
        if len(wanted) < 2:
            return
        limit_s = 2 * self._limit_s
        self._phase("importing torch beside GPUs", limit_s)
        ids = {node.context.label: node.id for node in self.nodes}
        ends = {name: start_on(ids[label], LinkEnd, {"num_gpus": 1}) for name, label in wanted}
        ready, failures = gather({name: end.ready.remote() for name, end in ends.items()}, limit_s)
        for name, error in failures.items():
            cure = "see what uses the GPUs (ray status); end it, or leave this check out"
            yield replace(warning("nccl", f"no process with a free GPU: {describe_failure(error, limit_s)}", cure), node=name)
        inside = [(f"{label} GPU 0", f"{label} GPU 1") for label in gpus]
        plan = [
            [pair for pair in inside if ready.keys() >= {*pair}],
            *pair_rounds([f"{label} GPU 0" for label in gpus if f"{label} GPU 0" in ready]),
        ]
        yield from try_links(ends, [pairs for pairs in plan if pairs], self._bandwidth_s, "nccl", self._phase)

    @property
    def _driver_label(self) -> str:
        return next((node.context.label for node in self.nodes if node.id == self._driver), "")


def live_nodes(driver: str) -> list[Node]:
    """Return the live nodes, the node with the id `driver`, that of this process, first."""
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: (node["NodeID"] != driver, node["NodeManagerAddress"]))
    addresses = [node["NodeManagerAddress"] for node in alive]
    gcs_port = int(ray.get_runtime_context().gcs_address.rpartition(":")[2])
    found = []
    for node in alive:
        address, resources = node["NodeManagerAddress"], node["Resources"]
        label = address if addresses.count(address) == 1 else f"{address} {node['NodeID'][:6]}"
        ports = {node[key]: name for key, name in _PORTS.items() if node.get(key)}
        if "node:__internal_head__" in resources:
            ports[gcs_port] = "head"
        found.append(Node(node["NodeID"], NodeContext(label, address, True, ports, node["NodeID"] == driver), resources))
    return found


def start_on(node: str, kind: type, options: dict) -> Any:
    """Start an actor of the class `kind` on the node with this id, and on no other. Return its handle (Ray declares no methods)."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(kind).options(**({"num_cpus": 0, "scheduling_strategy": strategy} | options)).remote()


def unresponsive_node(check: str, label: str, error: BaseException | None, limit_s: float) -> Record:
    """Return the record of a node on which none of the doctor's processes answers."""
    detail = describe_failure(error, limit_s)
    if "its node has died" in detail:
        detail = "the node left the cluster, or stopped answering Ray, while it was checked"
    if "No module named 'megatron_aspo" in str(error):
        return failed(check, detail, f"install megatron_aspo on {label}, in the environment that Ray was started from")
    cure = (
        f"see whether {label} is frozen, swapping or waiting for a file system; if it does not recover, stop Ray there and start it again"
    )
    return failed(check, detail, cure)


def check_gpus_of_ray(resources: dict[str, float], records: list[Record]) -> Record | None:
    """Check that Ray hands out all GPUs of the node; return None for a node without GPUs."""
    facts = {name: value for record in records for name, value in record.facts.items()}
    there, given = int(facts.get("number of GPUs", 0)), int(resources.get("GPU", 0))
    if not there and not given:
        return None
    if given == there:
        return ok("GPUs of Ray", f"{given}")
    cure = "start Ray on this node again, without CUDA_VISIBLE_DEVICES, or with ray start --num-gpus"
    return warning("GPUs of Ray", f"Ray hands out {given} GPUs, nvidia-smi lists {there}", cure)
