"""Kill a tiny run again and again, resume it each time, and compare it with an undisturbed run.

    .venv/bin/python tools/prove/torture.py [--rounds 10] [--seed 0] [key.path=value …]

The run is deterministic: real Ray, vLLM and Megatron-Core, with an asynchronous checkpoint after every step. Its driver gets
SIGKILL at `rounds` random moments, a third of them while it starts, and once more, with all its descendants, while a checkpoint is being
written. Each time it is started again with `--resume auto`. In the end weights, optimizer state, rollouts and metrics (without timings) are
compared, the ledger is searched for prompts that were lost or trained on twice, and every file of a checkpoint is truncated and has a bit
flipped, each of which must be refused. Then a run on a full disk must stop with status 2 and leave its last checkpoint complete (needs the
right to mount a tmpfs: root, or `unshare -rm`).

Takes about 15 minutes on 2 cores. The last line is one JSON object; exit status 1 if anything differed.
"""

import argparse
import json
import os
import random
import shutil
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

from megatron_aspo.checkpoint.manifest import read_manifest  # noqa: E402
from megatron_aspo.common.errors import UserError  # noqa: E402
from megatron_aspo.runtime.ledger import history, read_ledger  # noqa: E402
from tests.e2e.workplace import make_workplace, start, timeless  # noqa: E402

STEPS = 24
SMALL_DISK_MIB = 24
SMALL = ["trainer.tensor_parallel=1", "rollout.engines=1", "evaluation.draws=0", "checkpoint.every=1"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the tiny recipe")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        workplace = Path(directory)
        make_workplace(workplace)
        words = [*SMALL, f"steps={STEPS}", "checkpoint.keep_last=3", *parsed.overrides]
        finish(workplace, "name=whole", *words)
        kills = torture(workplace, parsed.rounds, random.Random(parsed.seed), ["name=torn", *words])
        result = compare(workplace / "runs" / "whole", workplace / "runs" / "torn")
        result |= {"kills": kills, "rounds": sum(kills.values())}
        result |= damage(workplace / "runs" / "torn")
        result["full_disk_stops_cleanly"] = full_disk(workplace, words)
    good = result["bit_equal"] and not (result["groups_lost"] or result["groups_doubled"] or result["damage_accepted"])
    print(json.dumps(result))
    return 0 if good and result["full_disk_stops_cleanly"] else 1


def finish(workplace: Path, *words: str) -> None:
    process = start(workplace, *words)
    _, error = process.communicate(timeout=900)
    if process.returncode:
        raise SystemExit(f"{words[0]} ended with status {process.returncode}: {error[-2000:]}")


def torture(workplace: Path, rounds: int, moments: random.Random, words: list[str]) -> dict[str, int]:
    """Kill and resume the run; return how many kills fell while it started, trained and saved."""
    run = workplace / "runs" / "torn"
    kills = {"starting": 0, "training": 0, "saving": 0}
    plan = ["starting"] * (rounds // 3) + ["training"] * (rounds - rounds // 3)
    moments.shuffle(plan)
    plan.insert(rounds // 2, "saving")
    for what in plan:
        began = len(read_ledger(run / "ledger.jsonl")) if (run / "ledger.jsonl").exists() else 0
        process = start(workplace, *words, "resume=auto")
        if what == "starting":
            time.sleep(moments.uniform(0, 30))
        else:
            wait(process, lambda began=began: (run / "ledger.jsonl").exists() and len(read_ledger(run / "ledger.jsonl")) > began)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        if what == "training":
            time.sleep(moments.uniform(0, 3))
        if what == "saving":
            wait(process, lambda: any((run / "checkpoints").glob("*.unfinished-*")), pause=0)
        for member in family if what == "saving" else family[:1]:
            member.kill()
        process.communicate()
        if what == "saving" and not any((run / "checkpoints").glob("*.unfinished-*")):
            raise SystemExit("the kill came after the checkpoint was whole; run the tool again")
        kills[what] += 1
        done = [path.name for path in sorted(run.glob("checkpoints/*"))]
        print(f"killed while {what}: {', '.join(done) or 'no checkpoint yet'}", flush=True)
        # The processes that Ray leaves end without help; the machine has no memory for several sets of them.
        _, alive = psutil.wait_procs(family[1:], timeout=60)
        for member in alive:
            member.kill()
    finish(workplace, *words, "resume=auto")
    return kills


def wait(process: subprocess.Popen, condition, pause: float = 0.02) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the run ended before it could be killed: {process.stderr.read()[-2000:]}")
        time.sleep(pause)


def compare(whole: Path, torn: Path) -> dict:
    def tensors(run: Path) -> list[str]:
        sums = (run / "checkpoints" / f"step_{STEPS}" / "SHA256SUMS").read_text().splitlines()
        return [line for line in sums if ".safetensors" in line]

    equal = {
        "metrics": timeless(whole) == timeless(torn) and len(timeless(torn)) == STEPS,
        "weights, optimizer and random states": tensors(whole) == tensors(torn),
        "export": read(whole / f"exports/step_{STEPS}/model.safetensors") == read(torn / f"exports/step_{STEPS}/model.safetensors"),
        "rollouts": all(
            parquet.read_table(whole / f"rollouts/step_{step}.parquet").equals(parquet.read_table(torn / f"rollouts/step_{step}.parquet"))
            for step in range(STEPS)
        ),
    }
    print(f"equal: {equal}", flush=True)
    events = read_ledger(torn / "ledger.jsonl")
    steps = history(events)
    draws = [step["first"] + i for _, step in sorted(steps.items()) for i in range(step["count"])]
    expected = {step["first"] + i for step in history(read_ledger(whole / "ledger.jsonl")).values() for i in range(step["count"])}
    return {
        "bit_equal": all(equal.values()),
        "groups_lost": len(expected - set(draws)),
        "groups_doubled": len(draws) - len(set(draws)),
        "resumed_from_steps": [event["step"] for event in events if event["event"] == "resume"],
    }


def read(path: Path) -> bytes:
    return path.read_bytes()


def damage(run: Path) -> dict[str, int]:
    """Truncate every file of a checkpoint and flip a bit in it; return how many damages were tried and accepted."""
    checkpoint = run / "checkpoints" / f"step_{STEPS}"
    tried = accepted = 0
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        data = file.read_bytes()
        position = random.Random(str(file)).randrange(len(data))
        flipped = data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :]
        for broken in (data[:-1], data[: len(data) // 2], b"", flipped):
            file.write_bytes(broken)
            tried += 1
            try:
                read_manifest(checkpoint)
            except UserError as error:
                # A flipped name in the list is reported as a missing file.
                if file.name != "SHA256SUMS" and str(file) not in str(error):
                    raise
            else:
                accepted += 1
                print(f"accepted: {file}")
        file.write_bytes(data)
    read_manifest(checkpoint)
    return {"damage_tried": tried, "damage_accepted": accepted}


def full_disk(workplace: Path, words: list[str]) -> bool:
    """Run with every checkpoint kept on a disk with room for only a few; return whether it stopped as it must."""
    disk = workplace / "disk"
    disk.mkdir()
    arguments = ["name=full", f"run_dir={disk}/run", *words, "checkpoint.keep_last=0"]
    command = [sys.executable, "-m", "megatron_aspo", "train", "recipe.yaml", *arguments]
    check = workplace / "saved"
    script = (
        f'mount -t tmpfs -o size={SMALL_DISK_MIB}m tmpfs "$0" || exit 99; "$@"; status=$?; '
        f"cp -r {disk}/run/checkpoints {check}; exit $status"
    )
    answer = subprocess.run(
        ["unshare", "-m" if os.geteuid() == 0 else "-rm", "bash", "-c", script, str(disk), *command],
        cwd=workplace,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    left = sorted(path.name for path in check.iterdir()) if check.exists() else []
    print(f"full disk: status {answer.returncode}, left {left}; {answer.stderr.strip().splitlines()[-1:]}", flush=True)
    if answer.returncode != 2 or "no space left" not in answer.stderr or not left or any("unfinished" in name for name in left):
        return False
    for name in left:
        read_manifest(check / name)
    shutil.rmtree(check)
    return True


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
