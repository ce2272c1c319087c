"""Kill and freeze engines of a tiny run at random moments, and compare it with an undisturbed run.

    .venv/bin/python tools/prove/torture_engines.py [--rounds 30] [--seed 0] [key.path=value …]

The run is deterministic: real Ray, vLLM and Megatron-Core, two engines. Each round waits until the run has recovered from the last one and
for a random time, picks an engine, and sends its engine core, or the Ray actor above it, SIGKILL or SIGSTOP, whether it generates, receives
weights, sleeps or wakes. The run must replace the engine without help. With `placement=colocated`
engines sleep while ranks train.

The last line is one JSON object: rounds by signal, `restarts` counted in the run's output, `numbers_equal` (metrics without timings,
rollouts with token ids and log-probabilities), `left_processes`, `minutes`. Exit status 1 if the run failed, hung or differed.
"""

import argparse
import collections
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet as parquet

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.e2e.workplace import make_workplace, start, timeless  # noqa: E402

ANSWER_S = 10
RECOVERED_S = 120.0
"""Seconds that a run may take to start an engine again and to generate its share once more."""
TINY = ["evaluation.draws=0", f"rollout.answer_timeout_s={ANSWER_S}", f"trainer.timeout_s={ANSWER_S}", "rollout.max_response_tokens=64"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="seed of moments, engines and signals")
    parser.add_argument("--steps", type=int, default=0, help="steps of the run (default: enough for the rounds)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the tiny recipe")
    parsed = parser.parse_args()
    started = time.monotonic()
    steps = parsed.steps or 4 * parsed.rounds
    with tempfile.TemporaryDirectory() as directory:
        workplace = Path(directory)
        make_workplace(workplace)
        words = [*TINY, f"steps={steps}", *parsed.overrides]
        undisturbed = start(workplace, "name=whole", *words)
        _, error = undisturbed.communicate()
        if undisturbed.returncode:
            print(f"torture_engines.py: error: the undisturbed run failed: {error[-2000:]}", file=sys.stderr)
            return 1
        result = torture(workplace, parsed.rounds, random.Random(parsed.seed), ["name=torn", *words])
        if result["status"] == 0:
            result["numbers_equal"] = equal(workplace / "runs" / "whole", workplace / "runs" / "torn", steps)
    result["minutes"] = round((time.monotonic() - started) / 60, 1)
    print(json.dumps(result))
    good = result["status"] == 0 and result.get("numbers_equal") and not result["left_processes"]
    return 0 if good and sum(result["rounds"].values()) == parsed.rounds else 1


def torture(workplace: Path, rounds: int, dice: random.Random, words: list[str]) -> dict:
    """Disturb the run until it ends or the rounds are over, then let it finish; return the counts."""
    done: collections.Counter[str] = collections.Counter()
    command = [sys.executable, "-m", "megatron_aspo", "train", "recipe.yaml", *words]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    output = workplace / "output"
    with output.open("w") as file:
        process = subprocess.Popen(command, cwd=workplace, env=variables, stdout=file, stderr=file)
    family: dict[int, psutil.Process] = {}

    def restarts() -> int:
        return len(re.findall("started again: ", output.read_text()))

    while process.poll() is None and not (workplace / "runs/torn/metrics.jsonl").exists():
        time.sleep(0.1)
    while process.poll() is None and sum(done.values()) < rounds:
        time.sleep(dice.uniform(0.0, 6.0))
        family |= {child.pid: child for child in below(process.pid)}
        engines = [child for child in family.values() if is_engine(child)]
        if not engines:
            continue
        chosen, number, before = dice.choice(engines), dice.choice([signal.SIGKILL, signal.SIGSTOP]), restarts()
        kind = f"{number.name} {'core' if chosen.name() == 'EngineCore' else 'actor'}"
        try:
            chosen.send_signal(number)
        except psutil.NoSuchProcess:
            continue
        done[kind] += 1
        deadline = time.monotonic() + RECOVERED_S
        while process.poll() is None and restarts() == before and time.monotonic() < deadline:
            time.sleep(0.2)
    try:
        status = process.wait(1200)
    except subprocess.TimeoutExpired:
        process.kill()
        status = "hung"
    time.sleep(6)  # upper bound of the time that the run's guard takes
    if status != 0:
        print(output.read_text()[-4000:], file=sys.stderr)
    left = [pid for pid, child in family.items() if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    return {"rounds": dict(done), "restarts": restarts(), "status": status, "left_processes": len(left)}


def below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def is_engine(process: psutil.Process) -> bool:
    """Whether it is an engine core, or the actor that owns one."""
    try:
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED):  # hit already
            return False
        if process.name() == "EngineCore":
            return True
        return process.name().startswith("ray::Engine") and any(child.name() == "EngineCore" for child in process.children())
    except psutil.NoSuchProcess:
        return False


def equal(one: Path, other: Path, steps: int) -> bool:
    """Whether two runs have the same metrics and rollouts."""
    tables = ((parquet.read_table(run / "rollouts" / f"step_{step}.parquet") for run in (one, other)) for step in range(steps))
    return timeless(one) == timeless(other) and all(mine.equals(theirs) for mine, theirs in tables)


if __name__ == "__main__":
    sys.exit(main())
