"""Connecting a rank with the peers of its schedule: both ends must have derived the same plan; then each peer is given a transport."""

import torch

from megatron_aspo.hf.tensor_meta import torch_dtype
from megatron_aspo.sync.group import StatelessGroup
from megatron_aspo.sync.group_transport import GroupTransport
from megatron_aspo.sync.schedule import Schedule
from megatron_aspo.sync.shared_memory_transport import SharedMemoryTransport
from megatron_aspo.sync.transport import Transport


def connect_transports(schedule: Schedule, group: StatelessGroup, device: torch.device) -> dict[int, Transport]:
    """Return the transport to each peer of this rank; all ranks of the group must call it before any transfer.

    device: where the rank's weights lie. Raises TransferError when a peer's plan differs or it does not come, UserError when there is no
    room for shared memory.
    """
    group.compare_with_peers("plan", schedule.digests())
    group.connect(schedule.connections)
    dtype, peers = torch_dtype(schedule.dtype), schedule.peers
    shared = {peer for peer in peers if _share_memory(group, peer)}
    by_group = GroupTransport(group, dtype)
    if not shared:
        return dict.fromkeys(peers, by_group)
    by_memory = SharedMemoryTransport(schedule, group, shared, dtype, device)
    return {peer: by_memory if peer in shared else by_group for peer in peers}


def _share_memory(group: StatelessGroup, peer: int) -> bool:
    """Whether a peer can map memory of this rank. Under NCCL, ranks of a machine use its links between devices instead."""
    return group.device.type == "cpu" and group.hosts[peer] == group.hosts[group.rank]
