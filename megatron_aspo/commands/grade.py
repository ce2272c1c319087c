"""`megatron-aspo grade`: tries a recipe's reward on responses from a file."""

import argparse
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_aspo.common.errors import UserError
from megatron_aspo.config import load_optional
from megatron_aspo.data.sources import read_rows
from megatron_aspo.rewards.by_source import reward_of_source
from megatron_aspo.rewards.choice import NAMES
from megatron_aspo.rewards.process import RewardProcess
from megatron_aspo.rewards.response_row import ResponseRow
from megatron_aspo.rewards.result import RewardResult
from megatron_aspo.tasks.options import DataOptions
from megatron_aspo.tasks.task import TASKS


def run_grade(parsed: argparse.Namespace) -> None:
    """Grade `parsed.file` and print one JSON object per line, the summary last. Raises UserError, with file and line for a faulty row."""
    results, started = [], time.monotonic()
    with Rewards(parsed) as rewards:
        for where, row in read_responses(parsed.file):
            reward = rewards.of(row.data_source, where)
            begun = time.monotonic()
            try:
                (result,) = reward.score([(row.prompt, row.response)])
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            verdict = result.failure or result.details.get("verdict", result.reason)
            verdict = verdict if isinstance(verdict, str) else json.dumps(verdict)
            line = {"score": result.score, "verdict": verdict, "reason": result.reason, "seconds": round(time.monotonic() - begun, 3)}
            print(json.dumps(line), flush=True)
            results.append((result, verdict))
    print(json.dumps({"summary": summarize(results, time.monotonic() - started)}), flush=True)


def summarize(results: list[tuple[RewardResult, str]], seconds: float) -> dict[str, Any]:
    """Return count, mean score, number of each verdict, and wall-clock time in seconds."""
    mean = round(statistics.fmean(result.score for result, _ in results), 6) if results else None
    verdicts = Counter(verdict for _, verdict in results)
    return {"responses": len(results), "mean_score": mean, "verdicts": verdicts, "seconds": round(seconds, 3)}


class Rewards:
    """The reward of each row: the recipe's, that of --reward, or that of the row's data source. A context manager, which closes them.

    Each reward has its own process, as in a run: if it hangs or crashes, one response fails.
    """

    def __init__(self, parsed: argparse.Namespace):
        """Choose the reward. Raises UserError for options that name none, or two."""
        self._only: RewardProcess | None = None
        self._by_name: dict[str, RewardProcess] = {}
        if parsed.recipe and parsed.reward:
            raise UserError(f"--reward {parsed.reward} and --recipe {parsed.recipe} both name a reward; give one of the two")
        if config := load_optional(parsed.recipe, parsed.overrides):
            self._only = _start(config.task, config.data)
        elif parsed.reward:
            self._only = _named(parsed.reward)

    def of(self, data_source: str, where: str) -> RewardProcess:
        """Return the reward of a data source. Raises UserError, with `where` in the file, if it has none."""
        if self._only:
            return self._only
        name = reward_of_source(data_source) or data_source
        if name not in self._by_name:
            if name not in NAMES and (name not in TASKS or name == "dataset"):
                raise UserError(f"{where}: data_source={data_source!r} names no reward; choose one with --reward or --recipe")
            self._by_name[name] = _named(name)
        return self._by_name[name]

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *_: Any) -> None:
        for reward in (self._only, *self._by_name.values()):
            if reward:
                reward.close()


def _start(task: str, options: DataOptions) -> RewardProcess:
    process = RewardProcess(task, options, os.getcwd())
    try:
        process.start()
    except BaseException:
        process.close()
        raise
    return process


def _named(name: str) -> RewardProcess:
    if name in TASKS and name != "dataset":
        return _start(name, DataOptions())
    if name not in NAMES and ":" not in name:
        known = [*NAMES, *(task for task in TASKS if task != "dataset")]
        raise UserError(f"--reward {name} is unknown; choose {', '.join(known)}, or package.module:function")
    return _start("dataset", DataOptions(reward=name))


def read_responses(path: Path) -> Iterator[tuple[str, ResponseRow]]:
    """Yield each row's location in the file, for messages, and the row. Raises UserError for the first faulty row."""
    for row in read_rows(str(path), "response, ground_truth and data_source"):
        try:
            response = ResponseRow(row.fields, row.number)
        except ValueError as error:
            raise UserError(f"{row.where}: {error}") from error
        yield row.where, response
