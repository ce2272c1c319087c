"""The checks of one node, with a time limit for each."""

from collections.abc import Iterator
from functools import partial

from megatron_aspo.doctor.files import check_data, check_model
from megatron_aspo.doctor.gpus import check_gpus, check_torch, gpu_devices
from megatron_aspo.doctor.limits import check_locked_memory, check_open_files, check_processes
from megatron_aspo.doctor.local_pair import check_pair
from megatron_aspo.doctor.needs import NodeContext, RunNeeds
from megatron_aspo.doctor.ports import check_ports
from megatron_aspo.doctor.record import Record
from megatron_aspo.doctor.runner import Check, run_checks
from megatron_aspo.doctor.sandbox import check_sandbox
from megatron_aspo.doctor.storage import check_hub_cache, check_ray_token, check_run_directory, check_shared, check_temporary_directory
from megatron_aspo.doctor.versions import check_versions


def node_checks(needs: RunNeeds, context: NodeContext, limit_s: float) -> dict[str, Check]:
    """Return the checks by name, in the order of the table."""
    checks: dict[str, Check] = {
        "versions": check_versions,
        "GPUs": partial(check_gpus, limit_s),
        "torch": partial(check_torch, context, limit_s),
        "nccl": partial(check_pair, limit_s),
        "run directory": partial(check_run_directory, needs),
        "temporary files": check_temporary_directory,
        "shared memory": partial(check_shared, needs),
        "hub cache": partial(check_hub_cache, needs),
        "open files": partial(check_open_files, context.in_ray),
        "locked memory": check_locked_memory,
        "processes": check_processes,
        "ports": partial(check_ports, context.ray_ports),
        "Ray token": partial(check_ray_token, context.in_ray),
        "sandbox": partial(check_sandbox, needs),
    }
    if context.in_ray or gpu_devices() < 2:
        del checks["nccl"]  # in a cluster, pairs of nodes are checked later
    if needs.model:
        checks["model"] = partial(check_model, needs.model)
    if needs.data:
        checks["data"] = partial(check_data, needs.data, context.reads_data)
    return checks


def check_node(needs: RunNeeds, context: NodeContext, limit_s: float) -> Iterator[Record]:
    """Run the node's checks; yield each record as soon as it is available."""
    return run_checks(node_checks(needs, context, limit_s), context.label, limit_s)
