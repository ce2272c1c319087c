"""Records as a table for people, and as one JSON object for issue reports."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import megatron_aspo
from megatron_aspo.doctor.record import Record
from megatron_aspo.doctor.redact import redact

PAIR = " – "
"""Separator between the names of two nodes."""
CHECKS = (
    "Ray cluster",
    "Ray process",
    "versions",
    "same on all nodes",
    "GPUs",
    "GPUs of Ray",
    "torch",
    "clock",
    "gloo",
    "nccl",
    "run directory",
    "shared directory",
    "temporary files",
    "shared memory",
    "hub cache",
    "open files",
    "locked memory",
    "processes",
    "ports",
    "Ray token",
    "sandbox",
    "model",
    "data",
    "placement",
    "doctor",
)
"""The checks' names, in the order of the table."""


def format_table(records: Sequence[Record]) -> Iterator[str]:
    """Yield a line for each record, followed by the cure for a warning or failure."""
    checks = max((len(record.check) for record in records), default=0)
    nodes = max((len(record.node) for record in records if PAIR not in record.node), default=0)  # pairs may exceed the column
    for record in records:
        yield f"{record.status:<8} {record.check:<{checks}}  {record.node:<{nodes}}  {record.detail}".rstrip()
        if record.cure:
            yield f"{'':<8} {'':<{checks}}  → {record.cure}"
    yield ""
    yield format_summary(records)


def format_summary(records: Iterable[Record]) -> str:
    counts = Counter(record.status for record in records)
    return f"{counts['ok']} ok, {counts['warning']} warnings, {counts['failed']} failed"


def sort_records(records: Iterable[Record]) -> list[Record]:
    """Sort the records by check, in the order of `CHECKS`, keeping the order of the nodes."""
    positions = {check: position for position, check in enumerate(CHECKS)}
    return sorted(records, key=lambda record: positions.get(record.check, len(CHECKS)))


def as_json(records: Sequence[Record], seconds: float) -> dict:
    """Return one object without secrets and user names."""
    return {
        "megatron_aspo": megatron_aspo.__version__,
        "status": "failed" if any(record.status == "failed" for record in records) else "ok",
        "seconds": round(seconds, 1),
        "checks": [vars(redact(record)) for record in records],
    }
