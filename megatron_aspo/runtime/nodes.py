"""Assignment of ranks and engines to nodes: pure functions, no Ray."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_aspo.common.errors import UserError
from megatron_aspo.rollout.engine_layout import EngineSizes


def ranks_by_node(processes: Sequence[tuple[str, str]], tensor: int) -> list[int]:
    """Return the process that becomes rank 0, 1, …: node by node, and within a node in the order of its devices.

    Thus the ranks of a tensor-parallel group, which communicate most, share a node. processes: node and device ("" on CPU) of each.
    Raises UserError where that is impossible.
    """
    nodes = list(dict.fromkeys(node for node, _ in processes))
    for node in nodes if len(nodes) > 1 else ():
        count = sum(process[0] == node for process in processes)
        if count % tensor:
            raise UserError(
                f"of {len(processes)} training ranks {count} are on one node, which is no multiple of trainer.tensor_parallel={tensor}: a "
                "tensor-parallel group would span nodes; pin the ranks to nodes by trainer.resource, with a multiple on each, or lower it"
            )
    return sorted(range(len(processes)), key=lambda n: (nodes.index(processes[n][0]), len(processes[n][1]), processes[n][1], n))


@dataclass(frozen=True)
class NodeShare:
    """The ranks and engines of one node."""

    ranks: range
    engines: tuple[int, ...]


def shares_of_nodes(nodes: int, ranks: int, tensor: int, engines: EngineSizes, colocated: bool) -> list[NodeShare]:
    """Return the ranks and engines of each of `nodes` equal nodes: ranks fill them first, then engines; colocated engines share devices.

    Raises UserError where a tensor-parallel group or an engine would span nodes.
    """
    devices = ranks if colocated else ranks + engines.world
    if devices % nodes:
        raise UserError(f"{devices} devices are no multiple of --nodes {nodes}: every node is taken to have as many; choose another number")
    per_node, first_engine = devices // nodes, 0 if colocated else ranks
    shares = [NodeShare(range(min(ranks, n * per_node), min(ranks, (n + 1) * per_node)), ()) for n in range(nodes)]
    for share in shares:
        if len(share.ranks) % tensor:
            raise UserError(
                f"on {nodes} nodes of {per_node} devices one has {len(share.ranks)} training ranks, no multiple of "
                f"trainer.tensor_parallel={tensor}: a tensor-parallel group would span nodes; choose sizes that divide the node"
            )
    engines_of_nodes: list[list[int]] = [[] for _ in range(nodes)]
    for engine in range(engines.engines):
        begin = first_engine + engine * engines.tensor
        if begin // per_node != (begin + engines.tensor - 1) // per_node:
            raise UserError(
                f"on {nodes} nodes of {per_node} devices engine {engine} would span two; an engine lives on one: choose a "
                "rollout.tensor_parallel that divides the node"
            )
        engines_of_nodes[begin // per_node].append(engine)
    return [NodeShare(share.ranks, tuple(found)) for share, found in zip(shares, engines_of_nodes, strict=True)]
