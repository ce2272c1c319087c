#!/usr/bin/env python
"""Compare the first and the last evaluation of a run, question by question.

    python tools/compare_evaluations.py runs/laptop_code

Prints the mean reward of each question before and after, then the means over all questions and their difference, each with the 95 %
interval of a bootstrap over questions (20,000 resamples, the same in every call). The difference is paired: both evaluations have the same
questions, so its interval is narrower than those of the means suggest. The last line is the result as JSON.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_aspo.evaluation.statistics import interval_of_mean, resample

RESAMPLES = 20_000


def read_means(path: Path) -> dict[str, float]:
    """Return the mean reward of each question, in order of the file."""
    rewards: dict[str, list[float]] = {}
    for answer in json.loads(path.read_text(encoding="utf-8"))["answers"]:
        rewards.setdefault(answer["question"], []).append(answer["reward"])
    return {question: float(np.mean(values)) for question, values in rewards.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run directory")
    run = parser.parse_args().run
    paths = {int(match[1]): path for path in run.glob("evaluations/*") if (match := re.fullmatch(r"step_(\d+)\.json", path.name))}
    if len(paths) < 2:
        print(f"compare_evaluations.py: {run} needs 2 evaluations and has {len(paths)}; train with evaluation.draws above 0")
        return 2
    first, last = min(paths), max(paths)
    before, after = read_means(paths[first]), read_means(paths[last])
    if list(before) != list(after):
        print(f"compare_evaluations.py: {paths[first]} and {paths[last]} asked different questions; compare evaluations of one data set")
        return 2
    for question, mean in before.items():
        print(f"{mean:.2f} → {after[question]:.2f}  {' '.join(question.split())[:110]}")
    old, new = np.array(list(before.values())), np.array(list(after.values()))
    result, positions = {"steps": [first, last], "questions": len(old)}, resample(len(old), RESAMPLES)
    for name, values in (("before", old), ("after", new), ("difference", new - old)):
        low, high = interval_of_mean(values, positions)
        print(f"{name:<10} {values.mean():.3f}  95 % interval {low:.3f} to {high:.3f}")
        result[name] = {"mean": round(float(values.mean()), 4), "interval": [round(low, 4), round(high, 4)]}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
