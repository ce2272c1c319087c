#!/usr/bin/env python
"""Draw a run's held-out accuracy and training reward against the number of training steps.

    python tools/plot/plot_accuracy.py runs/quickstart -o docs/figures/quickstart.svg

The tool reads `evaluations/step_N.json` (accuracy with its standard error) and `metrics.jsonl` (mean reward) of a run directory. The
background is transparent and the colours can be read on a light page and on a dark one (colours.py). The suffix of the output file, .svg
or .png, chooses the format. The numbers drawn are written beside the picture, as JSON of the same name, and printed as the last line.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent))

from colours import BLUE, GREY, PURPLE

TEXT, ACCURACY, REWARD = GREY, BLUE, PURPLE


def read_accuracy(run: Path) -> list[tuple[int, float, float]]:
    """Return (steps done, accuracy, its standard error) of every evaluation of the run, in order of steps."""
    found = []
    for path in (run / "evaluations").glob("step_*.json"):
        if match := re.fullmatch(r"step_(\d+)\.json", path.name):
            accuracy = json.loads(path.read_text(encoding="utf-8"))["accuracy"]
            found.append((int(match[1]), accuracy["mean"], accuracy["standard_error"]))
    return sorted(found)


def read_reward(run: Path) -> list[tuple[int, float]]:
    """Return (steps done before, mean reward) of every step: a step's responses come from the weights that it starts with."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(metrics["step"], metrics["reward/mean"]) for metrics in map(json.loads, lines)]


def draw(accuracy: list[tuple[int, float, float]], reward: list[tuple[int, float]], out: Path) -> None:
    """Write the picture: accuracy with one standard error up and down, reward as a dashed line."""
    plt.rcParams.update({"svg.hashsalt": "megatron_aspo", "svg.fonttype": "none", "font.size": 12, "font.family": "sans-serif"})
    figure, axes = plt.subplots(figsize=(6.0, 3.2))
    axes.plot(*zip(*reward, strict=True), color=REWARD, linewidth=2.2, linestyle=(0, (3, 1.5)), label="mean training reward")
    steps, means, errors = zip(*accuracy, strict=True)
    axes.errorbar(steps, means, yerr=errors, color=ACCURACY, linewidth=2.4, marker="o", markersize=6, capsize=3, label="held-out accuracy")
    # Below the error bars, where no line is.
    for position, offset in ((0, (6, -22)), (-1, (0, -22))):
        axes.annotate(
            f"{means[position]:.2f}",
            (steps[position], means[position]),
            offset,
            textcoords="offset points",
            color=ACCURACY,
            ha="center",
            weight="bold",
        )
    axes.set(xlabel="training steps", ylim=(0, 1.05), xlim=(min(steps) - 0.5, max(steps) + 0.5))
    axes.set_xticks([step for step in range(min(steps), max(steps) + 1) if len(steps) > 20 or step in steps])
    axes.grid(axis="y", color=TEXT, alpha=0.25)
    axes.tick_params(colors=TEXT, length=0)
    axes.xaxis.label.set_color(TEXT)
    for side in axes.spines.values():
        side.set_visible(False)
    # Above the axes, where no gridline crosses it.
    axes.legend(frameon=False, labelcolor=TEXT, loc="lower center", bbox_to_anchor=(0.47, 1.0), ncols=2, handlelength=2.6)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if out.suffix == ".svg" else None
    figure.savefig(out, transparent=True, dpi=200, metadata=metadata)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/quickstart")
    parser.add_argument("-o", "--out", type=Path, required=True, help="picture to write, .svg or .png")
    parsed = parser.parse_args()
    if parsed.out.suffix not in (".svg", ".png"):
        parser.error(f"{parsed.out}: the ending chooses the format; use .svg or .png")
    missing = [name for name in ("evaluations", "metrics.jsonl") if not (parsed.run / name).exists()]
    if missing:
        parser.error(f"{parsed.run} has no {' and no '.join(missing)}; name the directory of a run with evaluation.draws above 0")
    accuracy, reward = read_accuracy(parsed.run), read_reward(parsed.run)
    if not accuracy or not reward:
        parser.error(f"{parsed.run} has {len(accuracy)} evaluations and {len(reward)} steps; at least one of each is needed")
    draw(accuracy, reward, parsed.out)
    numbers = json.dumps({"accuracy": accuracy, "reward": reward})
    parsed.out.with_suffix(".json").write_text(numbers + "\n")
    print(numbers)


if __name__ == "__main__":
    main()
