"""Compare one off-policy optimizer step on every layout of tests/parallel/layout_cases.py with one process of PyTorch in float64.

    .venv/bin/python tools/prove/check_layouts.py [--list] [--only WORDS …]

Real Megatron-Core processes over gloo, float32, up to eight at a time: tensor, sequence, pipeline, interleaved, context, data and expert
parallelism, alone and combined; several micro-batches of 64 tokens, unless a case sets another number; shared prompts; recomputed
activations. The reference is tests/reference/decoder.py, which shares no code with Megatron or this project.

A line for each layout: largest |difference| / largest |value| over all gradients and all updated weights, tensor by tensor; the same for
the gradient norm and the loss; log-probabilities in nats; seconds. `sharded`: with the distributed optimizer no rank has a whole gradient,
so weights and norm are compared. Then, for each model, the spread over its layouts. The last line is one JSON object; exit status 1 if
anything is above 1e-5 or fails. Takes about 6 minutes on 2 cores.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.parallel.layout_cases import BAR, BEYOND, SUITE, LayoutCase, differences, read_table  # noqa: E402
from tests.parallel.pool import Pool  # noqa: E402
from tests.parallel.test_one_step import Case, run, truth  # noqa: E402

COLUMNS = ("gradients", "weights", "norm", "loss", "logprobs")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORDS", default=[], help="the layouts that have all words of one of these")
    parser.add_argument("--list", action="store_true", help="print the layouts and exit")
    parsed = parser.parse_args()
    cases = choose(sorted(read_table(SUITE + BEYOND), key=lambda case: case.processes), parsed.only)
    width = max(len(case.name) for case in cases)
    if parsed.list:
        for case in cases:
            print(f"{case.name:{width}} {case.processes:2}")
        return 0
    disable_progress_bar()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # inherited by the processes: Megatron's are many and the same in each
    print(f"{'layout':{width}} processes {' '.join(f'{name:>9}' for name in COLUMNS)} {'s':>5}", flush=True)
    with tempfile.TemporaryDirectory() as directory, Steps(Path(directory)) as steps:
        for case in cases:
            print(f"{case.name:{width}} {steps.take(case)}", flush=True)
        for line in steps.by_model():
            print(line)
        print(json.dumps(steps.summary()))
        return 0 if steps.good else 1


def choose(cases: list[LayoutCase], only: list[str]) -> list[LayoutCase]:
    """Return the cases that --only selects. Raises SystemExit where nothing has all words of one of `only`."""
    words = [set(name.split()) for name in only]
    for chosen in words:
        if not any(chosen <= set(case.name.split()) for case in cases):
            raise SystemExit(f"no layout has the words {' '.join(sorted(chosen))!r}; --list prints all")
    return [case for case in cases if not words or any(chosen <= set(case.name.split()) for chosen in words)]


def import_modules(rank: int, meeting: str) -> None:
    """Import once in each process of the pool: it takes minutes beside other work, and is no part of a step's seconds."""
    import megatron_aspo.trainer.rank  # noqa: F401


class Steps:
    """Takes the steps, one pool of processes at a time, and keeps the results."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.made: dict[str, Case] = {}
        self.found: dict[str, dict[str, float]] = {}
        self.failed: list[str] = []
        self.reports: dict[str, list[tuple[float, float]]] = defaultdict(list)
        """For each model: (loss over the mean |loss| of a token, gradient norm) of each layout."""
        self._pool: tuple[int, Pool] | None = None

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_) -> None:
        self._close()

    def take(self, case: LayoutCase) -> str:
        """Take one step; return the line to print."""
        if case.model not in self.made:
            self.made[case.model] = case.make(self.directory / case.model)
        samples = self.made[case.model]
        true = truth(samples, "aspo")
        try:
            pool = self._processes(case.processes)
            start = time.perf_counter()
            results = run(lambda world: pool, samples, "aspo", **case.options)
            found = differences(results, true)
        except Exception as error:
            # Its processes may wait for each other forever.
            self._close()
            self.failed.append(case.name)
            print(error, file=sys.stderr, flush=True)
            return f"{case.processes:9} FAILED: {str(error).strip().splitlines()[-1]}"
        self.found[case.name] = found
        total, count = results[-1]["tally"]["loss"]
        self.reports[case.model].append((total / count / true.mean_token_loss, results[0]["norm"]))
        figures = [f"{found[name]:9.1e}" if name in found else f"{'sharded':>9}" for name in COLUMNS]
        above = "" if max(found.values()) <= BAR else f"  ABOVE {BAR:.0e}"
        return f"{case.processes:9} {' '.join(figures)} {time.perf_counter() - start:5.1f}{above}"

    def by_model(self) -> list[str]:
        """Return a line for each model with the spread over its layouts."""
        lines = []
        for model, reports in sorted(self.reports.items()):
            losses, norms = np.array(reports).T
            if len(reports) > 1:
                spread = f"loss within {np.ptp(losses):.1e}, gradient norm within {np.ptp(norms) / norms.mean():.1e} of each other"
                lines.append(f"{model}: {len(reports)} layouts, {spread}")
        return lines

    def summary(self) -> dict:
        figures = {f"{case}: {name}": value for case, found in self.found.items() for name, value in found.items()}
        worst = max(figures, key=figures.get, default=None)
        return {
            "layouts": len(self.found) + len(self.failed),
            "max_rel_diff": figures.get(worst),
            "worst": worst,
            "failed": self.failed,
            "megatron_core": version("megatron-core"),
        }

    @property
    def good(self) -> bool:
        return not self.failed and all(max(found.values()) <= BAR for found in self.found.values())

    def _processes(self, world: int) -> Pool:
        """Return the pool of `world` processes; a pool of another size ends first, to free memory."""
        if self._pool is None or self._pool[0] != world:
            self._close()
            self._pool = world, Pool(world)
            self._pool[1].run(import_modules, timeout_s=900)
        return self._pool[1]

    def _close(self) -> None:
        if self._pool is not None:
            self._pool[1].close()
        self._pool = None


if __name__ == "__main__":
    # Processes that wait for each other outlive a parent that exits at once.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
