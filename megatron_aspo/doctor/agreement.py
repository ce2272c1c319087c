"""Comparison of the nodes' facts: versions, source, model, driver."""

from collections.abc import Mapping
from dataclasses import replace

from megatron_aspo.doctor.record import Record, failed, ok, warning

_MAY_DIFFER = ("kind of GPU", "number of GPUs")
"""Facts whose difference slows a run down but does not break it."""


def compare_nodes(records: Mapping[str, list[Record]], driver: str) -> list[Record]:
    """Compare each node's facts with those of `driver`; return one record for each node but `driver`.

    records: those of each node that answered.
    """
    facts = {node: {name: value for record in found for name, value in record.facts.items()} for node, found in records.items()}
    if driver not in facts:
        return []
    reference, result = facts.pop(driver), []
    for node, own in facts.items():
        differing = [
            f"{name} is {own.get(name, 'missing')}, on {driver} {reference.get(name, 'missing')}"
            for name in dict.fromkeys((*reference, *own))
            if own.get(name) != reference.get(name)
        ]
        mild = all(text.startswith(_MAY_DIFFER) for text in differing)
        if not differing:
            record = ok("same on all nodes", f"{len(own)} facts are those of {driver}")
        elif mild:
            record = warning("same on all nodes", "; ".join(differing), "expect the slowest device to set the pace, or leave the node out")
        else:
            cure = f"install and copy on {node} what {driver} has; then start Ray there again"
            record = failed("same on all nodes", "; ".join(differing), cure)
        result.append(replace(record, node=node))
    return result
