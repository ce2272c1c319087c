"""One end of a trial connection between two ranks: a real process group of the kind that transfers the weights."""

import time
from dataclasses import dataclass

import torch

from megatron_aspo.sync.group import StatelessGroup, TransferError, stateless_group

_CHUNK_BYTES = 4 << 20
_PINGS = 20


@dataclass(frozen=True)
class LinkSpeed:
    """The connection as measured at one end."""

    round_trip_s: float
    """Shortest time of one byte in each direction."""
    bytes_per_s: float
    """Receive speed of this end; 0 if only the connection was tried."""


def measure_link(
    host: str, port: int, rank: int, names: tuple[str, str], seconds: float, timeout_s: float, backend: str = "gloo"
) -> LinkSpeed:
    """Connect to the other rank at rank 0's `host:port` and send bytes for about `seconds` seconds, half of the time in each direction.

    names: the two ranks' names in errors. seconds: 0 sends only single bytes. backend: `gloo | nccl`.
    Raises TransferError, at most `timeout_s` after the start of a transfer, if the other end is missing or the bytes differ.
    """
    group = stateless_group(host, port, rank, 2, timeout_s, backend, names=names.__getitem__)
    try:
        group.connect([(0, 1), (1, 0)])
        round_trip = min(_ping(group) for _ in range(_PINGS))
        speeds = {source: _send_for(group, source, seconds / 2) for source in (0, 1)} if seconds else {}
        # Neither end leaves while the other still receives.
        _ping(group)
        return LinkSpeed(round_trip, speeds.get(1 - rank, 0.0))
    finally:
        group.close()


def _ping(group: StatelessGroup) -> float:
    byte = torch.zeros(1, dtype=torch.uint8, device=group.device)
    started = time.monotonic()
    for source in (0, 1):
        _move(group, byte, source, "one byte")
    return time.monotonic() - started


def _send_for(group: StatelessGroup, source: int, seconds: float) -> float:
    """Send chunks from `source` for about `seconds`; return bytes per second."""
    chunk = torch.full((_CHUNK_BYTES,), 1 + source if group.rank == source else 0, dtype=torch.uint8, device=group.device)
    count = torch.zeros(1, dtype=torch.int64, device=group.device)
    started = time.monotonic()
    _move(group, chunk, source, "a first chunk")
    if group.rank == source:
        # The time of one chunk gives the number that fills the time.
        count.fill_(max(1, int(seconds / max(1e-9, time.monotonic() - started))))
    _move(group, count, source, "the number of chunks")
    chunks, started = int(count), time.monotonic()
    for number in range(chunks):
        _move(group, chunk, source, f"chunk {number} of {chunks}")
    speed = chunks * _CHUNK_BYTES / max(1e-9, time.monotonic() - started)
    if int(chunk[0]) != 1 + source or int(chunk[-1]) != 1 + source:
        raise TransferError(f"{group.name_of(group.rank)}: other bytes arrived than {group.name_of(source)} sent")
    return speed


def _move(group: StatelessGroup, tensor: torch.Tensor, source: int, what: str) -> None:
    transfer = group.send(tensor, 1 - source, what) if group.rank == source else group.receive(tensor, source, what)
    transfer.wait()
