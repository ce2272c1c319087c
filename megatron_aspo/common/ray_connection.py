"""Whether this process is connected to a Ray cluster."""

import ray

from megatron_aspo.common.errors import UserError


def require_cluster() -> None:
    """Raises UserError when no cluster is open: Ray would start one at the first call, and that one listens on every interface."""
    if not ray.is_initialized():
        raise UserError("no Ray cluster is open; open one first, by megatron_aspo.runtime.cluster.open_cluster('', logical_cpus)")
