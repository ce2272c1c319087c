"""What a rehearsal left: its table, whether two are the same, evaluations that were done twice, and what the trackers show."""

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.workplace import timeless, without_timings
from tools.rehearsal.commands import Commands


def table(commands: Commands) -> list[dict[str, str]]:
    """Return the rows of the pipeline's results.csv, and one more, `merged`, from the evaluation of the merged model."""
    task = commands.subject.task
    rows = list(csv.DictReader((commands.run / "evaluations" / task / "results.csv").open(encoding="utf-8")))
    result = json.loads((commands.merged / "output" / f"{task}.results.json").read_text(encoding="utf-8"))
    row = {"step": "merged", "problems": str(result["problems"])}
    for name, estimate in result["metrics"].items():
        row |= {name: str(estimate["mean"]), f"{name} low": str(estimate["low"]), f"{name} high": str(estimate["high"])}
    return [*rows, row]


def format_table(rows: Sequence[dict[str, str]]) -> str:
    """Return each metric with its interval, a line for each row."""
    names = [name for name in rows[0] if f"{name} low" in rows[0]]
    lines = ["step    " + "".join(f"{name:28}" for name in names)]
    for row in rows:
        cells = (f"{float(row[name]):.3f} [{float(row[f'{name} low']):.3f}, {float(row[f'{name} high']):.3f}]" for name in names)
        lines.append(f"{row['step']:8}" + "".join(f"{cell:28}" for cell in cells))
    return "\n".join(lines)


def differences(one: Commands, other: Commands) -> list[str]:
    """Return what differs between two rehearsals, in tables and in metrics that do not depend on time; empty if nothing does."""
    found = []
    for kind, read in (("table", table), ("metrics", lambda commands: timeless(commands.run))):
        mine, theirs = read(one), read(other)
        if len(mine) != len(theirs):
            found.append(f"{kind}: {len(mine)} rows and {len(theirs)}")
        for a, b in zip(mine, theirs, strict=False):
            found += [f"{kind}, step {a['step']}: {line}" for line in _unequal(a, b)]
    return found


def _unequal(a: dict, b: dict) -> list[str]:
    return [f"{name} is {a.get(name)} and {b.get(name)}" for name in sorted({*a, *b}) if a.get(name) != b.get(name)]


def merged_differs(commands: Commands) -> list[str]:
    """Return the metrics in which the merged model's row is not that of the last checkpoint."""
    *_, last, merged = table(commands)
    return [f"merged: {name} is {merged[name]} and {last[name]}" for name in merged if name != "step" and merged[name] != last[name]]


def redone_differs(run: Path) -> list[str]:
    """Return what differs between steps that were done again after a death and what they gave before, without timings."""
    before = run / "metrics.superseded.jsonl"
    if not before.exists():
        return []
    now = {step["step"]: step for step in timeless(run)}
    lines = [without_timings(json.loads(line)) for line in before.read_text(encoding="utf-8").splitlines()]
    return [f"step {old['step'] + 1}, done again: {line}" for old in lines for line in _unequal(old, now[old["step"]])]


def repeated(outputs: Sequence[Path]) -> int:
    """Return how many parts of evaluations were generated, or graded, more than once. outputs: what the watchers printed."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for output in outputs:
        step = ""
        for line in output.read_text(encoding="utf-8").splitlines():
            if found := re.match(r"(step_\d+): evaluating", line):
                step = found[1]
            elif found := re.match(r"(part \d+): problems \d+ to \d+: (generated|\d)", line):
                counts[step, found[1], "generated" if found[2] == "generated" else "graded"] += 1
    return sum(count - 1 for count in counts.values())


def steps_with_gradient(run: Path) -> int:
    """Return the number of steps whose gradient was not zero."""
    return sum(step.get("train/gradient_norm", 0) > 0 for step in timeless(run))


def missing_in_trackers(commands: Commands) -> list[str]:
    """Return what the trackers lack of one run that has training and evaluations under the same steps; empty if nothing."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    events = EventAccumulator(str(commands.run / "tensorboard")).Reload()
    read = {name: sorted({event.step for event in events.Tensors(name)}) for name in events.Tags()["tensors"]}
    sizes = commands.sizes
    if (seen := read.get("reward/mean")) != [*range(1, sizes.steps + 1)]:
        found.append(f"TensorBoard has reward/mean of steps {seen}")
    expected = [*range(sizes.checkpoint_every, sizes.steps + 1, sizes.checkpoint_every)]
    evaluated = [name for name in read if name.startswith("val/") and name.endswith(f"avg@{sizes.samples}")]
    if [read[name] for name in evaluated] != [expected]:
        found.append(
            f"TensorBoard has { ({name: read[name] for name in evaluated}) }, not one val/…/avg@{sizes.samples} of steps {expected}"
        )
    ids = {path.stem.removeprefix("run-") for path in (commands.run / "wandb").glob("*/run-*.wandb")}
    if ids != {commands.subject.name}:
        found.append(f"W&B has the runs {sorted(ids)}, not {commands.subject.name} alone")
    return found
