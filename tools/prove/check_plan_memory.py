"""Compare the memory that `megatron-aspo plan` predicts for ranks and engine workers with that of real runs:

    python tools/prove/check_plan_memory.py

Trains SmolLM2-135M for two steps in three configurations on this machine's CPU, and reads the memory of each training rank and engine
worker from the kernel while it runs: private and shared memory, the latter divided among the processes that share it, without mapped files.
The memory of a process that has only imported the same libraries is subtracted from the peak, since a plan does not count it.

The last line is one JSON object: `worst` is the largest |plan / measured - 1| over all, `shapes` has the figures of each in GB.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

MODEL = ROOT / "models" / "smollm2-135m-instruct"
COMMON = [f"model={MODEL}", "steps=2", "evaluation.draws=0", "algorithm.kl_coef=0.001"]
SHAPES = {
    "quickstart": [],
    "TP3 float32, full recomputation": [
        "trainer.dtype=float32",
        "rollout.dtype=float32",
        "trainer.tensor_parallel=3",
        "trainer.recompute=full",
        "trainer.micro_batch_tokens=2048",
        "rollout.engines=1",
        "rollout.kv_cache_gib=0.5",
    ],
    "DP2 bfloat16, distributed optimizer, long micro-batches": [
        "trainer.data_parallel=2",
        "trainer.distributed_optimizer=true",
        "trainer.micro_batch_tokens=1536",
        "rollout.engines=1",
        "rollout.max_response_tokens=48",
        "rollout.prompts_per_step=16",
        "algorithm.mini_batch_prompts=8",
    ],
}
IMPORTS = {
    "rank": "import ray, megatron_aspo.trainer.rank, megatron.core.models.gpt, megatron.core.optimizer, megatron.core.pipeline_parallel",
    "worker": "import megatron_aspo.rollout.engine, ray, vllm.v1.engine.async_llm, vllm.v1.worker.cpu_worker",
}
TITLES = {"rank": "ray::TrainerActor", "worker": "ray::Engine"}
"""Prefixes of the names that Ray gives the processes. On a CPU an engine's core is a forked child of Ray's process."""
_FIELDS = re.compile(r"^(?:Pss_Anon|Pss_Shmem): +(\d+) kB$", re.MULTILINE)


def resident_bytes(pid: int) -> int:
    """Return the bytes of a process's memory without mapped files, shared parts divided by sharers; 0 once it has ended."""
    with contextlib.suppress(OSError):
        return 1024 * sum(map(int, _FIELDS.findall(Path(f"/proc/{pid}/smaps_rollup").read_text())))
    return 0


def import_bytes(statement: str) -> int:
    """Return the bytes that a process holds after the imports alone."""
    command = [sys.executable, "-c", f"{statement}\nprint('ready', flush=True); input()"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    if "ready\n" not in iter(process.stdout.readline, ""):
        raise SystemExit(f"check_plan_memory: error: {statement!r} fails")
    size = resident_bytes(process.pid)
    process.communicate("\n")
    return size


def measured_bytes(words: list[str]) -> dict[str, int]:
    """Return the largest peak among the run's ranks, and among its engine workers, in bytes."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "megatron_aspo", "train", "examples/recipes/quickstart.yaml", *words, f"run_dir={name}/run"]
        with open(f"{name}/output", "w+") as output:
            process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
            peaks = dict.fromkeys(TITLES, 0)
            while process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    for child in process.children(recursive=True):
                        with contextlib.suppress(psutil.Error):
                            title = " ".join(child.cmdline())
                            if title.startswith(TITLES["worker"]) and not child.parent().cmdline()[0].startswith(TITLES["worker"]):
                                continue  # the engine's front end
                            for kind, begins in TITLES.items():
                                if title.startswith(begins):
                                    peaks[kind] = max(peaks[kind], resident_bytes(child.pid))
                time.sleep(0.1)
            output.seek(0)
            if process.returncode or not all(peaks.values()):
                raise SystemExit(f"check_plan_memory: error: status {process.returncode}, peaks {peaks}:\n{output.read()[-3000:]}")
    return peaks


def planned_bytes(words: list[str]) -> dict[str, int]:
    command = [sys.executable, "-m", "megatron_aspo", "plan", "examples/recipes/quickstart.yaml", *words, "--device", "cpu", "--json"]
    plan = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
    return {"rank": max(rank["total"] for rank in plan["ranks"]), "worker": plan["engine_worker"]["total"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SHAPES, nargs="+", default=list(SHAPES))
    options = parser.parse_args()
    if not (MODEL / "config.json").is_file():
        parser.exit(2, f"check_plan_memory: error: {MODEL} is missing; make it with tools/make_smollm2.py\n")
    bare = {kind: import_bytes(statement) for kind, statement in IMPORTS.items()}
    shapes, worst = {}, 0.0
    for name in options.only:
        words = [*COMMON, *SHAPES[name]]
        plan, real = planned_bytes(words), measured_bytes(words)
        shapes[name] = {}
        for kind, base in bare.items():
            above = real[kind] - base
            ratio = plan[kind] / above
            worst = max(worst, abs(ratio - 1))
            figures = {"planned": plan[kind] / 1e9, "measured": above / 1e9, "imports": base / 1e9, "planned_over_measured": ratio}
            shapes[name][kind] = {key: round(value, 3) for key, value in figures.items()}
        print(name, json.dumps(shapes[name]), flush=True)
    print(json.dumps({"worst": round(worst, 3), "shapes": shapes}))


if __name__ == "__main__":
    main()
