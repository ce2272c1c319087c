"""Measure how long an asynchronous checkpoint holds up training, against a synchronous one.

    .venv/bin/python tools/bench/bench_checkpoint.py [--model models/smollm2-135m-instruct] [--rounds 4]

One training rank with the optimizer state of a model in float32. Synchronous and asynchronous checkpoints alternate, each finished before
the next one begins. The last line is one JSON object; the result is a ratio of medians, as machines are noisy.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parsed = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

    import torch.distributed as dist

    from megatron_aspo.checkpoint.request import ATTEMPT, SaveRequest
    from megatron_aspo.checkpoint.saver import RankSaver
    from megatron_aspo.losses.options import AlgorithmOptions
    from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
    from megatron_aspo.trainer.rank import TrainerRank
    from megatron_aspo.trainer.settings import RankSettings

    settings = RankSettings(parsed.model, TrainerOptions(dtype="float32"), OptimizerOptions(), AlgorithmOptions(), 1.0, 0, 8, 16)
    trainer = TrainerRank(settings, 0, dist.HashStore())
    saver = RankSaver(trainer)
    saver.reserve()
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / ATTEMPT).write_text("bench")
        stall_s: dict[bool, list[float]] = {False: [], True: []}
        total_s: list[float] = []
        for number in range(parsed.rounds):
            for asynchronous in (False, True):
                target = Path(directory) / "checkpoints" / f"step_{number}_{asynchronous}"
                started = time.perf_counter()
                stall_s[asynchronous].append(saver.save(SaveRequest(target, "bench", {"step": number}, "", asynchronous)))
                saver.finish()
                total_s.append(time.perf_counter() - started)
        size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    trainer.close()
    synchronous, asynchronous = (statistics.median(stall_s[kind]) for kind in (False, True))
    print(f"{size / 1e9:.2f} GB; an asynchronous one is complete after {statistics.median(total_s[1::2]):.2f} s")
    print(
        json.dumps(
            {
                "stall_over_synchronous": round(asynchronous / synchronous, 4),
                "synchronous_s": round(synchronous, 3),
                "asynchronous_s": round(asynchronous, 3),
                "first_asynchronous_s": round(stall_s[True][0], 3),
                "gigabytes": round(size / 1e9, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
