#!/usr/bin/env python
"""Draw the ASPO paper's diagnosis for your runs: mean weight and mean ratio of tokens with A > 0 against A < 0, by step.

    python tools/plot/plot_weights.py runs/weights-aspo runs/weights-ppo_clip runs/weights-no_is --out docs/figures/weights_by_sign.svg

Reads each run's `config.yaml` and `metrics.jsonl`. The background is transparent and the colours can be read on a light page and on a dark
one (colours.py). Writes the numbers drawn beside the picture, as JSON of the same name. The last line printed is one JSON object: the means
over all steps for each policy loss.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from colours import BLUE, GREY, RED

FIGURES = ("weight", "ratio")
SIGNS = ("positive", "negative")


def read_run(directory: Path) -> tuple[str, dict[str, list[float]]]:
    """Return the policy loss, and `metric/sign` → a value for each step that made an update; also the mean reward."""
    loss = yaml.safe_load((directory / "config.yaml").read_text())["algorithm"]["policy_loss"]
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if all(f"train/{metric}/{sign}" in step for metric in FIGURES for sign in SIGNS)]
    series = {f"{metric}/{sign}": [step[f"train/{metric}/{sign}"] for step in steps] for metric in FIGURES for sign in SIGNS}
    return loss, {"step": [step["step"] + 1 for step in steps], **series, "reward": [step["reward/mean"] for step in steps]}


def draw(runs: dict[str, dict[str, list[float]]], out: Path) -> None:
    """Write the picture, one row for each run: on the left the weight that multiplies the policy gradient, on the right the ratio r."""
    style = {
        "svg.hashsalt": "megatron_aspo",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 12,
        "axes.edgecolor": GREY,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    colours = {"text.color": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY}
    with plt.rc_context(style | colours):
        size = (6.4, 0.7 + 2.1 * len(runs))
        figure, axes = plt.subplots(len(runs), 2, figsize=size, sharex=True, sharey="col", squeeze=False, layout="constrained")
        for row, (loss, series) in zip(axes, runs.items(), strict=True):
            for ax, name in zip(row, FIGURES, strict=True):
                for sign, colour, label in zip(SIGNS, (BLUE, RED), ("A > 0", "A < 0"), strict=True):
                    ax.plot(series["step"], series[f"{name}/{sign}"], color=colour, marker="o", markersize=4, label=label)
                ax.axhline(1.0, color=GREY, alpha=0.5, linewidth=0.8, zorder=0)
            row[0].set_ylabel(loss)
        for ax, title in zip(axes[0], ("mean weight w", "mean ratio r"), strict=True):
            ax.set_title(title, fontsize=12)
        for ax in axes[-1]:
            ax.set_xlabel("rollout step")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, transparent=True, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, default=Path("docs/figures/weights_by_sign.svg"))
    parsed = parser.parse_args()
    runs = {}
    for directory in parsed.runs:
        loss, series = read_run(directory)
        if loss in runs or not series["step"]:
            parser.error(f"{directory}: {'a second run of ' + loss if loss in runs else 'no step made an update'}")
        runs[loss] = series
    draw(runs, parsed.out)
    parsed.out.with_suffix(".json").write_text(json.dumps(runs) + "\n")
    means = {loss: {name: sum(values) / len(values) for name, values in series.items() if name != "step"} for loss, series in runs.items()}
    print(json.dumps(means))


if __name__ == "__main__":
    main()
