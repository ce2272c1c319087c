"""`megatron-aspo plan-sync`: what a weight sync would send, from a Hugging Face config alone.

It plans the whole transfer and adds it up, exactly. Training ranks fill nodes of --node-devices in order; engines fill further nodes, or
with --colocated the same devices in order. The last line is one JSON object: gigabytes in all, over the least that any plan could send; of
the busiest sender and receiver, and how far senders are from even; between nodes; buckets and steps; and the seconds that the busiest
device needs at the given speeds, if links are the only limit.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from megatron_aspo.common.errors import UserError
from megatron_aspo.hf.model import read_sizes
from megatron_aspo.hf.tensor_meta import torch_dtype
from megatron_aspo.rollout.engine_layout import EngineHoldings, EngineSizes
from megatron_aspo.sync.plan import RankNodes, count_least_traffic, count_traffic, fill_buckets
from megatron_aspo.weights.families import homes
from megatron_aspo.weights.holdings import TrainingHoldings
from megatron_aspo.weights.layout import LayoutError, ModelDims, ParallelSizes, check_divisible

AXES = ("tensor", "pipeline", "data", "virtual", "expert", "expert_tensor", "context")


def run_plan_sync(parsed: argparse.Namespace) -> None:
    """Print the plan's metrics as one JSON object. Raises UserError for a model or layout that cannot be planned."""
    started = time.perf_counter()
    try:
        itemsize = torch_dtype(parsed.dtype).itemsize
    except ValueError as error:
        raise UserError(f"--dtype: {error}") from error
    architecture, dims = read_sizes(parsed.model)
    sizes = _parse_sizes(parsed.train)
    engines = EngineSizes(parsed.engine_tensor, parsed.engine_expert_parallel, parsed.engines)
    nodes = fill_nodes(sizes.world, engines.world, parsed.node_devices, parsed.colocated)
    found = plan_transfer(architecture, dims, sizes, engines, nodes, itemsize, parsed.bucket_mb * 10**6)
    print(
        json.dumps(
            {
                "training_ranks": sizes.world,
                "engine_workers": engines.world,
                "tensors": found["tensors"],
                "gb": round(found["bytes"] / 1e9, 3),
                "bytes_over_bound": found["bytes"] / found["least_bytes"] if found["least_bytes"] else 1.0,
                "between_nodes_gb": round(found["bytes_between_nodes"] / 1e9, 3),
                "out_gb_busiest": round(found["busiest_sender"] / 1e9, 3),
                "out_busiest_over_mean": round(found["busiest_sender"] / max(found["mean_sender"], 1), 4),
                "in_gb_busiest": round(found["busiest_receiver"] / 1e9, 3),
                "buckets": found["buckets"],
                "rounds": found["steps"],
                "seconds": round(
                    max(found["busiest_between"] / parsed.between_gb_s, found["busiest_within"] / parsed.within_gb_s) / 1e9, 4
                ),
                "planning_seconds": round(time.perf_counter() - started, 2),
            }
        )
    )


def fill_nodes(training: int, workers: int, node_devices: int, colocated: bool) -> RankNodes:
    """Return the nodes of all ranks when nodes are filled in order. Raises UserError for colocated workers without a training rank."""
    nodes = [rank // node_devices for rank in range(training)]
    if colocated:
        if workers > training:
            raise UserError(
                f"{workers} engine workers cannot share the devices of {training} training ranks; start fewer, or leave --colocated out"
            )
        return RankNodes((*nodes, *nodes[:workers]), {training + worker: worker for worker in range(workers)})
    first = nodes[-1] + 1
    return RankNodes((*nodes, *(first + worker // node_devices for worker in range(workers))), {})


def plan_transfer(
    architecture: str, dims: ModelDims, sizes: ParallelSizes, engines: EngineSizes, nodes: RankNodes, itemsize: int, bucket_bytes: int
) -> dict[str, float]:
    """Plan a whole transfer; return its metrics, sizes in bytes. Raises UserError for sizes that do not fit the model."""
    with _named_as_in_recipes("trainer"):
        check_divisible(dims, sizes)
    with _named_as_in_recipes("rollout"):
        target = EngineHoldings(architecture, dims, engines)
    source = TrainingHoldings(architecture, dims, sizes)
    order, known = source.in_turns(), homes(architecture, dims)
    buckets = fill_buckets(order, target, lambda name: math.prod(known[name][0].rule.shape(dims)) * itemsize, bucket_bytes)
    traffic = count_traffic(order, source, target, nodes)
    senders = traffic.sent[: source.world] * itemsize
    received = traffic.received * itemsize
    passed_on = bool(traffic.sent[source.world :].any())
    within = np.maximum(traffic.sent - traffic.sent_between_nodes, traffic.received - traffic.received_between_nodes) * itemsize
    between = np.maximum(traffic.sent_between_nodes, traffic.received_between_nodes) * itemsize
    return {
        "bytes": int(received.sum()),
        "least_bytes": count_least_traffic(order, source, target, nodes) * itemsize,
        "bytes_between_nodes": int(traffic.sent_between_nodes.sum()) * itemsize,
        "busiest_sender": int(senders.max()),
        "mean_sender": float(senders.mean()),
        "busiest_receiver": int(received.max()),
        "tensors": len(order),
        "buckets": len(buckets),
        "steps": len(buckets) * (2 if passed_on else 1),
        "busiest_within": int(within.max()),
        "busiest_between": int(between.max()),
    }


@contextmanager
def _named_as_in_recipes(section: str) -> Iterator[None]:
    """Let errors about a layout name the options of this section of a recipe."""
    try:
        yield
    except LayoutError as error:
        raise error.worded(lambda name, value: f"{section}.{name}={value}") from None


def _parse_sizes(words: Sequence[str]) -> ParallelSizes:
    chosen = {}
    for word in words:
        axis, _, number = word.partition("=")
        if axis not in AXES or not number.isdecimal() or int(number) < 1:
            raise UserError(f"--train {word}: expected AXIS=NUMBER with an axis of {', '.join(AXES)}")
        chosen[axis] = int(number)
    return ParallelSizes(**chosen)
