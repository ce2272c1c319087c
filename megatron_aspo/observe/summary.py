"""The end of a run for a person, and its last line for a program."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from megatron_aspo.data.records import Group
from megatron_aspo.evaluation.accuracy import Accuracy

if TYPE_CHECKING:
    from megatron_aspo.runtime.run import Run

_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Evaluation:
    accuracy: Accuracy
    groups: list[Group]


def print_summary(run: "Run", before: Evaluation | None, after: Evaluation | None, minutes: float, tokens: int, checkpoint: Path) -> None:
    """A small table, one answer before and after, and one JSON object as the last line."""
    table = Table(title=run.config.name, show_header=False)
    if before and after:
        table.add_row("held-out accuracy before", str(before.accuracy))
        table.add_row("held-out accuracy after", str(after.accuracy))
    table.add_row("steps", str(run.config.steps))
    table.add_row("training minutes", f"{minutes:.1f}")
    table.add_row("generated tokens/s", f"{tokens / (60 * minutes):.0f}")
    if run.memory:
        table.add_row("peak memory", f"{run.memory.gb:.1f} GB")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    if before and after:
        question, old, new = _one_answer(before.groups, after.groups)
        for label, text in (("question", question), ("before", old), ("after", new)):
            console.print(f"{label + ':':<9} {text}", markup=False)
    console.print(f"run directory: {run.directory}", markup=False)
    console.print(f"Hugging Face checkpoint: {checkpoint}", markup=False)
    print(
        json.dumps(
            {
                "accuracy_before": before.accuracy.mean if before else None,
                "accuracy_after": after.accuracy.mean if after else None,
                "accuracy_before_standard_error": before.accuracy.standard_error if before else None,
                "accuracy_after_standard_error": after.accuracy.standard_error if after else None,
                "steps": run.config.steps,
                "train_minutes": round(minutes, 3),
                "tokens_per_second": round(tokens / (60 * minutes), 1),
                "peak_gb": round(run.memory.gb, 2) if run.memory else None,
                "run_dir": str(run.directory),
                "hf_checkpoint": str(checkpoint),
            }
        ),
        flush=True,
    )


def _one_answer(before: list[Group], after: list[Group]) -> tuple[str, str, str]:
    """A question, and the same draw of its answer before and after: the first pair of bare numbers that was wrong before and right after.

    Draws at temperature 1 of an untrained model can say anything, rude things too, so bare numbers are preferred where there are any.
    """
    pairs = [(old, new) for b, a in zip(before, after, strict=True) for old, new in zip(b.samples, a.samples, strict=True)]
    plain = [pair for pair in pairs if all(re.fullmatch(r"[\d\s.,=+\-*/]{1,60}", s.text) for s in pair)]
    old, new = next((pair for pair in plain if pair[0].reward < pair[1].reward), (plain or pairs)[0])
    return old.prompt.text, _line(old.text, old.reward), _line(new.text, new.reward)


def _line(text: str, reward: float) -> str:
    return f"{' '.join(text.split())[:_SHOWN_CHARACTERS]!r} (reward {reward:g})"
