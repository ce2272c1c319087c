"""The summary at the end of a run: a table to read, and a JSON line for programs."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from megatron_aspo.evaluation.accuracy import Answer, Evaluation
from megatron_aspo.observe.metrics import count_updates, read_metrics, untrained_warning

if TYPE_CHECKING:
    from megatron_aspo.config import Config
    from megatron_aspo.runtime.run import Run

_SHOWN_CHARACTERS = 60


def print_complete(config: "Config") -> None:
    """Print that the run was complete already, and one JSON object as the last line."""
    print(f"run {config.directory} is complete")
    updates = count_updates(read_metrics(config.directory / "metrics.jsonl"))
    paths = {"run_dir": str(config.directory), "hf_model": str(config.export_directory)}
    print(json.dumps({"steps": config.steps, "updates": updates, **paths}))


def print_summary(run: "Run", before: Evaluation | None, after: Evaluation | None, minutes: float, tokens: int, export: Path) -> None:
    """Print a table, one answer before and after training, and one JSON object as the last line.

    minutes, tokens: of this process. `updates` counts all steps in the run's metrics.jsonl, those of earlier processes included. A run
    without updates prints a warning.
    """
    steps = run.metrics.all()
    table = Table(title=run.config.name, show_header=False)
    if before and after:
        table.add_row("held-out accuracy before", str(before.accuracy))
        table.add_row("held-out accuracy after", str(after.accuracy))
    table.add_row("steps", str(run.config.steps))
    table.add_row("training minutes", f"{minutes:.1f}")
    if tokens:
        table.add_row("generated tokens/s", f"{tokens / (60 * minutes):.0f}")
    if run.memory:
        table.add_row("peak memory", f"{run.memory.gb:.1f} GB")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    if before and after:
        question, old, new = _one_answer(before.answers, after.answers)
        for label, text in (("question", question), ("before", old), ("after", new)):
            console.print(f"{label + ':':<9} {text}", markup=False)
    if warning := untrained_warning(steps):
        console.print(warning, markup=False)
    console.print(f"run directory: {run.directory}", markup=False)
    console.print(f"Hugging Face model: {export}", markup=False)
    print(
        json.dumps(
            {
                "accuracy_before": before.accuracy.mean if before else None,
                "accuracy_after": after.accuracy.mean if after else None,
                "accuracy_before_standard_error": before.accuracy.standard_error if before else None,
                "accuracy_after_standard_error": after.accuracy.standard_error if after else None,
                "steps": run.config.steps,
                "updates": count_updates(steps),
                "train_minutes": round(minutes, 3),
                "tokens_per_second": round(tokens / (60 * minutes), 1),
                "peak_gb": round(run.memory.gb, 2) if run.memory else None,
                "run_dir": str(run.directory),
                "hf_model": str(export),
            }
        ),
        flush=True,
    )


def _one_answer(before: Sequence[Answer], after: Sequence[Answer]) -> tuple[str, str, str]:
    """Return a question and the same draw of its answer before and after: the first pair of bare numbers, wrong before and right after.

    Samples of an untrained model at temperature 1 can contain anything, rude text too, so bare numbers are preferred if there are any.
    """
    pairs = list(zip(before, after, strict=True))
    plain = [pair for pair in pairs if all(re.fullmatch(r"[\d\s.,=+\-*/]{1,60}", s.text) for s in pair)]
    old, new = next((pair for pair in plain if pair[0].reward < pair[1].reward), (plain or pairs)[0])
    return old.question, _line(old.text, old.reward), _line(new.text, new.reward)


def _line(text: str, reward: float) -> str:
    return f"{' '.join(text.split())[:_SHOWN_CHARACTERS]!r} (reward {reward:g})"
