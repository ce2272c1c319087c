"""Check of a node's clock against that of this machine."""

import time
from collections.abc import Callable

from megatron_aspo.doctor.record import Record, failed, ok, warning

_TRIES = 5
_GOOD_S, _MOST_S = 1.0, 60.0
"""Skew up to which logs are not misleading; and skew beyond which certificates, tokens and file times are."""


def measure_skew(remote_time: Callable[[], float], tries: int = _TRIES) -> tuple[float, float]:
    """Return by how many seconds the remote clock is ahead, and the error bound: half of the shortest round trip."""
    best = (0.0, float("inf"))
    for _ in range(tries):
        sent = time.time()
        there = remote_time()
        back = time.time()
        if (half := (back - sent) / 2) < best[1]:
            best = (there - (sent + back) / 2, half)
    return best


def judge_skew(ahead_s: float, within_s: float) -> Record:
    detail = f"{ahead_s:+.3f} s against this machine, ± {within_s:.3f} s"
    surely = max(0.0, abs(ahead_s) - within_s)
    if surely <= _GOOD_S:
        return ok("clock", detail)
    cure = "run a time service on all nodes (chrony, systemd-timesyncd): timedatectl set-ntp true"
    return (failed if surely > _MOST_S else warning)("clock", detail, cure)
