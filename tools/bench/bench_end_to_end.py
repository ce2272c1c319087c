"""Train to a held-out accuracy here and with TRL's GRPOTrainer: .venv/bin/python tools/bench/bench_end_to_end.py [--seeds 0 1]

Both sides: SmolLM2-135M-Instruct, single-digit addition, the same prompts in the same order, 8 prompts × 8 responses of at most 12 tokens
per step, clipped policy loss (GRPO, mean over tokens, no KL), the same number of optimizer steps per rollout, the same learning rate, 2
threads, and float32 main weights with arithmetic in --dtype. TRL (tools/maintain/setup_trl.sh, with the repair described there) has its own
environment. Runs follow one another, seed by seed. After every step each side answers 20 held-out questions × --draws draws at temperature
1; the training clock starts at the first prompt and is stopped during evaluation.

Other load on a shared machine is the only thing that slows a repetition down. So both sides run again, alternately, until the two fastest
runs of a side with one seed agree to 10 % in seconds per step, at most --tries times; the fastest run counts, the others are discarded.

The last line is one JSON object of medians over seeds: `seconds_over_trl` (training seconds to --target, ours over TRL's; null unless both
sides reached it with every seed), `total_over_trl` (the same from the command on), `step_over_trl`, `startup_seconds` (ours, launch to the
first prompt), `peak_over_trl` (all processes of a run, shared pages counted once), and the measurements. Takes about half an hour on 2
cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from megatron_aspo.evaluation.accuracy import Evaluation  # noqa: E402
from megatron_aspo.observe.memory import PeakMemory  # noqa: E402

AGREE = 1.1
"""Two undisturbed runs with one seed differ by less than this."""


@dataclass
class Figures:
    """The measurements of one run."""

    startup: float
    steps: list[float] = field(default_factory=list)
    """Seconds of each step."""
    accuracy: list[float] = field(default_factory=list)
    """Held-out accuracy after each step."""
    tokens: int = 0
    peak_gb: float = 0.0

    @property
    def step(self) -> float:
        return statistics.median(self.steps)

    def seconds_to(self, target: float) -> float | None:
        for number, reached in enumerate(self.accuracy, 1):
            if reached >= target:
                return sum(self.steps[:number])
        return None

    def total_to(self, target: float) -> float | None:
        """Return the seconds from the command until the target is reached, evaluations left out; None if it never is."""
        seconds = self.seconds_to(target)
        return None if seconds is None else self.startup + seconds


Run = Callable[[argparse.Namespace, int, Path], Figures]


def ours(options: argparse.Namespace, seed: int, directory: Path) -> Figures:
    words = [
        f"run_dir={directory / 'run'}",
        f"steps={options.steps}",
        f"seed={seed}",
        "algorithm.policy_loss=ppo_clip",
        "algorithm.kl_coef=0",
        "algorithm.group_filter=none",
        "algorithm.epochs=1",
        f"algorithm.mini_batch_prompts={8 // options.updates}",
        f"optimizer.lr={options.lr}",
        f"trainer.dtype={options.dtype}",
        f"rollout.dtype={options.dtype}",
        "evaluation.every=1",
        f"evaluation.draws={options.draws}",
        *options.set,
    ]
    command = [sys.executable, "-m", "megatron_aspo", "train", "examples/recipes/quickstart.yaml", *words]
    figures, started = None, time.perf_counter()
    for line in lines(command, directory / "log"):
        if line.startswith("evaluation before training") and figures is None:
            figures = Figures(time.perf_counter() - started)
    metrics = [json.loads(line) for line in (directory / "run/metrics.jsonl").read_text().splitlines()]
    figures.steps = [step["seconds/step"] for step in metrics]
    figures.tokens = sum(step["tokens/generated"] for step in metrics)
    evaluations = [directory / f"run/evaluations/step_{number + 1}.json" for number in range(options.steps)]
    figures.accuracy = [Evaluation.read(path).accuracy.mean for path in evaluations]
    return figures


def theirs(options: argparse.Namespace, seed: int, directory: Path) -> Figures:
    settings = {
        "model": str(ROOT / "models/smollm2-135m-instruct"),
        "task": "single_digit_addition",
        "data": {"max_prompt_tokens": 64, "held_out_prompts": 20},
        "seed": seed,
        "steps": options.steps,
        "prompts": 8,
        "responses": 8,
        "max_tokens": 12,
        "temperature": 1.0,
        "updates": options.updates,
        "micro_batch": options.trl_micro_batch,
        "lr": options.lr,
        "dtype": options.dtype,
        "threads": 2,
        "draws": options.draws,
        "output": str(directory / "trl"),
    }
    command = [str(ROOT / "build/trl/bin/python"), "tools/bench/trl_peer.py", json.dumps(settings)]
    figures, before, started = None, 0.0, time.perf_counter()
    for line in lines(command, directory / "log"):
        event = json.loads(line) if line.startswith('{"') else {}
        if event.get("event") == "begin":
            figures = Figures(time.perf_counter() - started)
        elif "step" in event and event["step"] % options.updates == 0:
            figures.steps.append(event["seconds"] - before)
            figures.accuracy.append(event["accuracy"])
            before, figures.tokens = event["seconds"], event["tokens"]
    return figures


def lines(command: list[str], log: Path) -> Iterator[str]:
    """Yield the lines that the command prints, as they come. Raises SystemExit if it fails."""
    with log.open("w") as errors, subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        yield from process.stdout
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} … ended with status {process.returncode}:\n{log.read_text()[-3000:]}")


def measured(run: Run, options: argparse.Namespace, seed: int) -> Figures:
    """Run one side once and print its measurements as it ends."""
    with tempfile.TemporaryDirectory() as directory:
        memory = PeakMemory(every_s=1.0)
        figures = run(options, seed, Path(directory))
        memory.close()
    figures.peak_gb = memory.gb
    reached = figures.seconds_to(options.target)
    print(
        f"{run.__name__} seed {seed}: start-up {figures.startup:.1f} s, {figures.step:.2f} s a step, "
        f"{options.target} held out after {'–' if reached is None else f'{reached:.0f}'} s, "
        f"{figures.tokens / sum(figures.steps):.0f} tokens/s, {figures.peak_gb:.1f} GB; "
        f"held out {' '.join(f'{value:.2f}' for value in figures.accuracy)}",
        flush=True,
    )
    return figures


def undisturbed(options: argparse.Namespace, seed: int) -> dict[str, Figures]:
    """Return the fastest run of each side, once a second one agrees with it."""
    runs: dict[Run, list[Figures]] = {ours: [], theirs: []}
    for _ in range(options.tries):
        for run, done in runs.items():
            if not _agree(done):
                done.append(measured(run, options, seed))
                done.sort(key=lambda figures: figures.step)
    for run, done in runs.items():
        if not _agree(done):
            raise SystemExit(f"no two of {options.tries} runs of {run.__name__} agree to {AGREE}: try when the machine is quiet")
    return {run.__name__: done[0] for run, done in runs.items()}


def _agree(done: list[Figures]) -> bool:
    """Whether the first two of the runs, sorted from the fastest to the slowest, agree."""
    return len(done) > 1 and done[1].step <= AGREE * done[0].step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--updates", type=int, default=1, help="optimizer steps per rollout")
    parser.add_argument("--lr", type=float, default=4e-5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--target", type=float, default=0.75)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--trl-micro-batch", type=int, default=16, help="samples; 8, 16, 32, 64 took 22, 18, 21, 27 s a step")
    parser.add_argument("--tries", type=int, default=4)
    parser.add_argument("--set", nargs="*", default=[], metavar="key.path=value", help="changes to our recipe")
    options = parser.parse_args()
    subprocess.run(["bash", "tools/maintain/setup_trl.sh"], cwd=ROOT, check=True)
    chosen = [undisturbed(options, seed) for seed in options.seeds]

    def median(name: str, value: Callable[[Figures], float | None]) -> float | None:
        values = [value(figures[name]) for figures in chosen]
        return None if None in values else statistics.median(values)

    def medians(name: str) -> dict[str, float | None]:
        return {
            "seconds": median(name, lambda figures: figures.seconds_to(options.target)),
            "step": median(name, lambda figures: figures.step),
            "startup": median(name, lambda figures: figures.startup),
            "total": median(name, lambda figures: figures.total_to(options.target)),
            "tokens_per_second": median(name, lambda figures: figures.tokens / sum(figures.steps)),
            "peak_gb": median(name, lambda figures: figures.peak_gb),
        }

    us, trl = medians("ours"), medians("theirs")
    over = {key: None if None in (us[key], trl[key]) else round(us[key] / trl[key], 3) for key in us}
    rounded = [{key: value and round(value, 2) for key, value in side.items()} for side in (us, trl)]
    print(
        json.dumps(
            {
                "seconds_over_trl": over["seconds"],
                "step_over_trl": over["step"],
                "total_over_trl": over["total"],
                "startup_seconds": rounded[0]["startup"],
                "peak_over_trl": over["peak_gb"],
                "ours": rounded[0],
                "trl": rounded[1],
                "seeds": options.seeds,
            }
        )
    )


if __name__ == "__main__":
    main()
