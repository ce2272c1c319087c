"""Measure the seconds from the command to the first responses and the first update: python tools/bench/bench_start.py [--rounds 3]

Ours is the quickstart's recipe for one step without evaluation: SmolLM2-135M, one training rank, two engines. `first_token_s` ends when all
responses of the step (at most 12 tokens) are there, so it is an upper bound; `first_update_s` ends when the step's updates are done.
`stages` are the seconds that the run itself reports for each stage of its start.

The floor is the time that the libraries need alone: `ray.init`, then together two bare vLLM engines (AsyncLLM until it is up) and one
process that imports Megatron-Core and reads the model's tensors. Ours and floor alternate, in the element type that the processor computes
fastest. The last line is one JSON object of medians; peak_gb counts shared pages once.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from megatron_aspo.observe.memory import PeakMemory  # noqa: E402
from megatron_aspo.rollout.engine_settings import EngineSpec, engine_arguments, environment  # noqa: E402
from megatron_aspo.runtime.cluster import computes_bfloat16  # noqa: E402

MODEL = ROOT / "models" / "smollm2-135m-instruct"
RECIPE = ROOT / "examples" / "recipes" / "quickstart.yaml"
STAGE = re.compile(r"^(starting .*|checking .*): ([\d.]+) s$", re.MULTILINE)
RAY = "import ray; ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level='error'); print('ready', flush=True)"
ENGINE = """
import asyncio, json, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

async def main():
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**json.loads(sys.argv[1])))
    print("ready", flush=True)
    sys.stdin.readline()
    llm.shutdown()

if __name__ == "__main__":
    asyncio.run(main())
"""
RANK = """
import sys
import megatron.core.models.gpt, megatron.core.optimizer, megatron.core.pipeline_parallel
from safetensors.torch import load_file
tensors = {name: value.clone() for name, value in load_file(sys.argv[1]).items()}
print("ready", flush=True)
sys.stdin.readline()
"""


def floor(dtype: str) -> float:
    """Return the seconds that the libraries need alone."""
    spec = EngineSpec(0, str(MODEL), "cpu", dtype, 1, False, 140, 64, 0.5, 1, 0, ())
    ours = ("weight_transfer_config", "worker_extension_cls")
    arguments = {name: value for name, value in engine_arguments(spec).items() if name not in ours}
    variables = os.environ | environment(spec)
    with tempfile.TemporaryDirectory() as name:
        script = Path(name) / "engine.py"  # vLLM's spawned engine core imports the main module again: it must be a file
        script.write_text(ENGINE)
        began = time.perf_counter()
        # Ray's processes stay up while the others start, as in a run.
        ray = _start([sys.executable, "-c", RAY + "; input()"], os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"})
        _wait([ray])
        others = [_start([sys.executable, str(script), json.dumps(arguments)], variables) for _ in range(2)]
        others.append(_start([sys.executable, "-c", RANK, str(MODEL / "model.safetensors")], os.environ))
        _wait(others)
        seconds = time.perf_counter() - began
        for process in (ray, *others):
            process.communicate("\n", timeout=120)
    return seconds


def _start(command: list[str], variables: dict[str, str]) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=variables, text=True, **pipes)


def _wait(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        while (line := process.stdout.readline()) != "ready\n":
            if not line:
                raise SystemExit(f"bench_start: error: {process.args[:3]} ended with status {process.wait()}")


def ours(dtype: str) -> dict:
    """Return seconds and memory of one run."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        words = [f"run_dir={run}", "steps=1", "evaluation.draws=0", f"trainer.dtype={dtype}", f"rollout.dtype={dtype}"]
        command = [sys.executable, "-m", "megatron_aspo", "train", str(RECIPE), f"model={MODEL}", *words]
        memory = PeakMemory(every_s=1.0)
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        seen: dict[str, float] = {}
        while process.poll() is None:
            text = (run / "ledger.jsonl").read_text() if (run / "ledger.jsonl").exists() else ""
            for event in ("drawn", "trained"):
                if f'"{event}"' in text:
                    seen.setdefault(event, time.perf_counter() - began)
            time.sleep(0.05)
        output = process.stdout.read()
        memory.close()
        if process.returncode or len(seen) < 2:
            raise SystemExit(f"bench_start: error: the run ended with status {process.returncode}:\n{output}")
    stages = {stage: float(seconds) for stage, seconds in STAGE.findall(output)}
    return {"first_token_s": seen["drawn"], "first_update_s": seen["trained"], "peak_gb": memory.gb, "stages": stages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    if not (MODEL / "config.json").is_file():
        parser.exit(2, f"bench_start: error: {MODEL} is missing; make it with tools/make_smollm2.py\n")
    dtype = "bfloat16" if computes_bfloat16() else "float32"
    runs, floors = [], []
    for number in range(rounds):
        floors.append(floor(dtype))
        runs.append(ours(dtype))
        print(f"round {number + 1}: floor {floors[-1]:.1f} s, ours {runs[-1]}", flush=True)
    medians = {key: statistics.median(run[key] for run in runs) for key in ("first_token_s", "first_update_s", "peak_gb")}
    stages = {stage: statistics.median(run["stages"][stage] for run in runs) for stage in runs[0]["stages"]}
    floor_s = statistics.median(floors)
    figures = medians | {"floor_s": floor_s, "first_token_over_floor": medians["first_token_s"] / floor_s}
    print(json.dumps({key: round(value, 3) for key, value in figures.items()} | {"stages": stages, "dtype": dtype}))


if __name__ == "__main__":
    main()
