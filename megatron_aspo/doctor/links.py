"""Trial of the connections between nodes: each pair in a separate process group, disjoint pairs at the same time."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_aspo.doctor.calls import describe_failure, gather
from megatron_aspo.doctor.record import Record, failed, ok, warning
from megatron_aspo.doctor.table import PAIR

Pair = tuple[str, str]
Phase = Callable[[str, float], None]

TRANSFER_S = 10.0
"""Time limit of one transfer of a trial, and of the rendezvous."""
_SLOW_BYTES_PER_S = 50e6
"""Half the speed of a 1 Gbit/s network, at which the weights of a model of 1.5 billion parameters take a minute."""
_SLOW_SHARE = 0.25
"""Share of the median speed of all pairs below which a pair is slow."""
_CURE = (
    "allow TCP between these nodes on all ports (firewall, network policy), and see that Ray's addresses are of the network that they "
    "share: ray start --node-ip-address"
)
_NCCL_CURE = f"set NCCL_DEBUG=INFO before Ray is started and read NCCL's own reason in Ray's worker logs; then: {_CURE}"


@dataclass(frozen=True)
class Speed:
    """A connection between two nodes."""

    round_trip_s: float
    there: float
    """Bytes per second from the first node to the second; 0 if only the connection was tried."""
    back: float


def try_links(
    ends: Mapping[str, Any], plan: list[list[Pair]], seconds: float, backend: str, phase: Phase, transfer_s: float = TRANSFER_S
) -> Iterator[Record]:
    """Try all pairs, round by round; yield a record for each pair, the failed ones first.

    ends: node label → `LinkEnd` actor whose `ready` has returned. phase: called before each round, with its name and time limit. An end
    that does not answer is named and excluded from the later rounds.
    """
    speeds: dict[Pair, Speed] = {}
    silent: set[str] = set()
    for number, pairs in enumerate(plan):
        pairs = [pair for pair in pairs if not silent & {*pair}]
        limit_s = 3 * transfer_s + 2 * seconds + 5
        phase(f"{backend} connections, round {number + 1} of {len(plan)}", limit_s + 2 * transfer_s)
        points, failures = gather({pair: ends[pair[0]].meeting_point.remote() for pair in pairs}, transfer_s)
        calls = {
            (pair, rank): ends[pair[rank]].measure.remote(*point, rank, pair, seconds, transfer_s, backend)
            for pair, point in points.items()
            for rank in (0, 1)
        }
        answers, missing = gather(calls, limit_s)
        failures = {(pair, 0): error for pair, error in failures.items()} | missing
        for pair in pairs:
            if (pair, 0) in answers and (pair, 1) in answers:
                first, second = answers[pair, 0], answers[pair, 1]
                speeds[pair] = Speed(first.round_trip_s, second.bytes_per_s, first.bytes_per_s)
                continue
            silent_ends = [pair[rank] for rank in (0, 1) if failures.get((pair, rank), pair) is None]
            silent |= {*silent_ends}
            yield replace(_failure(pair, failures, silent_ends, backend, limit_s), node=_name(pair))
    yield from judge_speeds(speeds, backend)


def _failure(pair: Pair, failures: dict, silent_ends: list[str], backend: str, limit_s: float) -> Record:
    if silent_ends:
        labels = " and ".join(silent_ends)
        return failed(
            backend,
            f"{labels}: no answer within {limit_s:g} s; left out of the other connections",
            f"see whether {labels} is frozen, swapping or overloaded; its processes of Ray may have to be started again",
        )
    message = next(describe_failure(failures[pair, rank], limit_s) for rank in (1, 0) if (pair, rank) in failures)
    return failed(backend, message, _NCCL_CURE if backend == "nccl" else _CURE)


def judge_speeds(speeds: Mapping[Pair, Speed], backend: str) -> Iterator[Record]:
    """Yield one record for each pair: a warning if it is slow in absolute terms or compared with the others."""
    median = statistics.median([min(speed.there, speed.back) for speed in speeds.values()]) if speeds else 0.0
    for pair, speed in speeds.items():
        detail = f"round trip {speed.round_trip_s * 1000:.2f} ms"
        slowest = min(speed.there, speed.back)
        if slowest:
            detail += f", {speed.there / 1e9:.2f} GB/s there, {speed.back / 1e9:.2f} GB/s back"
        record = ok(backend, detail)
        cure = "look at the link of the slower node (ethtool, other traffic), and whether both use the fast network: --node-ip-address"
        if slowest and slowest < _SLOW_SHARE * median:
            record = warning(backend, f"{detail}; the median of all pairs is {median / 1e9:.2f} GB/s", cure)
        elif slowest and slowest < _SLOW_BYTES_PER_S:
            record = warning(backend, f"{detail}: slow for weights", cure)
        yield replace(record, node=_name(pair))


def _name(pair: Pair) -> str:
    return PAIR.join(pair)
