"""Measure time and memory of planning at scale: .venv/bin/python tools/bench/bench_plan.py

examples/models/qwen3-moe-deepseek-v3-size (721 billion parameters, 49,927 tensors) from 1,024 training ranks, TP8 × PP16 × DP8 with EP8, to
32 engines of TP8 and to 128 engines of TP8, nodes of 8 devices. One rank's view is every move it takes part in and the buckets, computed in
its own process from nothing but its rank; measured for the first, a middle and the last training rank and for the first and the last engine
worker. The whole plan is the one that `megatron-aspo plan-sync` sums up.

The last line is one JSON object: `rank_seconds` and `rank_mb` (peak above the imports) of the slowest and the largest; `global_seconds` of
the slower target.
"""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[2]))

from megatron_aspo.commands.plan_sync import fill_nodes, plan_transfer
from megatron_aspo.hf.model import read_sizes
from megatron_aspo.rollout.engine_layout import EngineHoldings, EngineSizes
from megatron_aspo.sync.plan import fill_buckets, plan_moves
from megatron_aspo.weights.families import homes
from megatron_aspo.weights.holdings import TrainingHoldings
from megatron_aspo.weights.layout import ParallelSizes

MODEL = Path(__file__).parents[2] / "examples/models/qwen3-moe-deepseek-v3-size"
TRAINING = ParallelSizes(tensor=8, pipeline=16, data=8, expert=8)
ENGINES = (32, 128)
BYTES, BUCKET = 2, 512 * 10**6


def peak_mb() -> float:
    """Return the peak memory of this process in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def view(rank: int, count: int) -> dict:
    """Compute one rank's view; return its size, seconds and memory."""
    read_sizes(MODEL)  # imports the modules that read configs
    before, started = peak_mb(), time.perf_counter()
    architecture, dims = read_sizes(MODEL)
    source, target = TrainingHoldings(architecture, dims, TRAINING), EngineHoldings(architecture, dims, EngineSizes(8, engines=count))
    order, known = source.in_turns(), homes(architecture, dims)
    buckets = fill_buckets(order, target, lambda name: math.prod(known[name][0].rule.shape(dims)) * BYTES, BUCKET)
    moves = plan_moves(rank, order, source, target, fill_nodes(source.world, target.world, 8, colocated=False))
    return {"seconds": time.perf_counter() - started, "mb": peak_mb() - before, "moves": len(moves), "buckets": len(buckets)}


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(view(int(sys.argv[1]), int(sys.argv[2]))))
        return
    architecture, dims = read_sizes(MODEL)
    views, seconds = [], []
    for count in ENGINES:
        for rank in (0, TRAINING.world // 2, TRAINING.world - 1, TRAINING.world, TRAINING.world + 8 * count - 1):
            command = [sys.executable, __file__, str(rank), str(count)]
            views.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(f"{count} engines, rank {rank}: {views[-1]}", flush=True)
        started = time.perf_counter()
        where = fill_nodes(TRAINING.world, 8 * count, 8, colocated=False)
        figures = plan_transfer(architecture, dims, TRAINING, EngineSizes(8, engines=count), where, BYTES, BUCKET)
        seconds.append(time.perf_counter() - started)
        print(f"{count} engines, all: {seconds[-1]:.1f} s, {figures}", flush=True)
    print(
        json.dumps(
            {
                "rank_seconds": round(max(v["seconds"] for v in views), 3),
                "rank_mb": round(max(v["mb"] for v in views), 1),
                "global_seconds": round(max(seconds), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
