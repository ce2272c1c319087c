"""What a weight sync would send, from a Hugging Face config alone:
.venv/bin/python tools/plan_sync.py examples/models/qwen3-30b-a3b --train tensor=4 pipeline=2 data=4 --engines 8 --engine-tensor 4

Plans the whole transfer and adds it up, exactly. Training ranks fill nodes of --node-devices in order, engines fill further nodes, or with
--colocated the same devices in order. The last line is one JSON object: gigabytes in all, over the least that any plan could send; of the
busiest sender and receiver, and how far senders are from even; between nodes; buckets and steps; and the seconds that the busiest device
needs at the given speeds, if links are all that limits.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_aspo.common.errors import UserError
from megatron_aspo.hf.model import read_sizes
from megatron_aspo.hf.tensor_meta import torch_dtype
from megatron_aspo.sync.plan import Where, in_buckets, least_traffic, traffic
from megatron_aspo.weights.families import homes
from megatron_aspo.weights.holdings import EngineHoldings, EngineSizes, TrainingHoldings
from megatron_aspo.weights.layout import ParallelSizes, check_divisible

AXES = ("tensor", "pipeline", "data", "virtual", "expert", "expert_tensor", "context")


def places(training: int, workers: int, node_devices: int, colocated: bool) -> Where:
    """Nodes filled in order."""
    nodes = [rank // node_devices for rank in range(training)]
    if colocated:
        if workers > training:
            raise UserError(
                f"{workers} engine workers cannot share the devices of {training} training ranks; start fewer, or leave --colocated out"
            )
        return Where((*nodes, *nodes[:workers]), {training + worker: worker for worker in range(workers)})
    first = nodes[-1] + 1
    return Where((*nodes, *(first + worker // node_devices for worker in range(workers))), {})


def planned(architecture: str, dims, sizes: ParallelSizes, engines: EngineSizes, where: Where, itemsize: int, bucket_bytes: int) -> dict:
    """The figures, in bytes."""
    check_divisible(dims, sizes)
    source, target = TrainingHoldings(architecture, dims, sizes), EngineHoldings(architecture, dims, engines)
    order = source.in_turns()
    places = homes(architecture, dims)
    buckets = in_buckets(order, target, lambda name: math.prod(places[name][0].rule.shape(dims)) * itemsize, bucket_bytes)
    added = traffic(order, source, target, where)
    senders = added.sent[: source.world] * itemsize
    received = added.received * itemsize
    least = least_traffic(order, source, target, where) * itemsize
    passing = bool(added.sent[source.world :].any())
    within = np.maximum(added.sent - added.sent_away, added.received - added.received_from_away) * itemsize
    between = np.maximum(added.sent_away, added.received_from_away) * itemsize
    return {
        "bytes": int(received.sum()),
        "least_bytes": least,
        "bytes_between_nodes": int(added.sent_away.sum()) * itemsize,
        "busiest_sender": int(senders.max()),
        "mean_sender": float(senders.mean()),
        "busiest_receiver": int(received.max()),
        "tensors": len(order),
        "buckets": len(buckets),
        "steps": len(buckets) * (2 if passing else 1),
        "busiest_within": int(within.max()),
        "busiest_between": int(between.max()),
    }


def sizes_of(words: list[str]) -> ParallelSizes:
    chosen = {}
    for word in words:
        axis, _, number = word.partition("=")
        if axis not in AXES or not number.isdecimal() or int(number) < 1:
            raise UserError(f"--train {word}: expected AXIS=NUMBER with an axis of {', '.join(AXES)}")
        chosen[axis] = int(number)
    return ParallelSizes(**chosen)


def count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} is not a number of at least 1")
    return int(word)


def speed(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{word} is not a number above 0")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory with a config.json")
    parser.add_argument("--train", nargs="*", default=[], metavar="AXIS=N", help=f"axes: {', '.join(AXES)}")
    parser.add_argument("--engines", type=count, default=1)
    parser.add_argument("--engine-tensor", type=count, default=1)
    parser.add_argument("--engine-expert-parallel", action="store_true")
    parser.add_argument("--node-devices", type=count, default=8)
    parser.add_argument("--colocated", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", help="of the engines")
    parser.add_argument("--bucket-mb", type=count, default=512)
    parser.add_argument(
        "--between-gb-s", type=speed, default=50.0, help="GB/s of one device to other nodes; 50: one link of 400 Gbit/s each"
    )
    parser.add_argument("--within-gb-s", type=speed, default=300.0, help="GB/s of one device inside its node")
    options = parser.parse_args()
    started = time.perf_counter()
    try:
        architecture, dims = read_sizes(options.model)
        sizes = sizes_of(options.train)
        engines = EngineSizes(options.engine_tensor, options.engine_expert_parallel, options.engines)
        where = places(sizes.world, engines.world, options.node_devices, options.colocated)
        itemsize = torch_dtype(options.dtype).itemsize
        figures = planned(architecture, dims, sizes, engines, where, itemsize, options.bucket_mb * 10**6)
    except (UserError, ValueError) as error:
        parser.exit(2, f"plan_sync: error: {error}\n")
    print(
        json.dumps(
            {
                "training_ranks": sizes.world,
                "engine_workers": engines.world,
                "tensors": figures["tensors"],
                "gb": round(figures["bytes"] / 1e9, 3),
                "bytes_over_bound": figures["bytes"] / figures["least_bytes"] if figures["least_bytes"] else 1.0,
                "between_nodes_gb": round(figures["bytes_between_nodes"] / 1e9, 3),
                "out_gb_busiest": round(figures["busiest_sender"] / 1e9, 3),
                "out_busiest_over_mean": round(figures["busiest_sender"] / max(figures["mean_sender"], 1), 4),
                "in_gb_busiest": round(figures["busiest_receiver"] / 1e9, 3),
                "buckets": figures["buckets"],
                "rounds": figures["steps"],
                "seconds": round(
                    max(figures["busiest_between"] / options.between_gb_s, figures["busiest_within"] / options.within_gb_s) / 1e9, 4
                ),
                "planning_seconds": round(time.perf_counter() - started, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
