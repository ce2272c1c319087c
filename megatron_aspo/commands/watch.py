"""`megatron-aspo eval --watch`: evaluates each checkpoint of a directory once, by any of several watchers.

A watcher claims a checkpoint by an flock on OUT/NAME.claim, which its child process inherits. The claim ends when both processes have
ended, for any reason: a checkpoint whose watcher was killed is evaluated by another, never by two at a time. OUT must be on a file system
whose locks hold between nodes (NFS since version 4, Lustre with -o flock). Each checkpoint is evaluated in a child process.

With `--stage generate` and `--stage grade` two kinds of watchers share the work: one on machines with GPUs, which needs the checkpoints,
and one on machines without, which needs only OUT.
"""

import argparse
import contextlib
import csv
import fcntl
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_aspo.checkpoint.manifest import is_checkpoint
from megatron_aspo.commands.eval_recipe import recipe_settings
from megatron_aspo.common.atomic import disk_errors, write_text
from megatron_aspo.common.errors import UserError
from megatron_aspo.config import Config, load_config
from megatron_aspo.evaluation.plan import make_plan
from megatron_aspo.evaluation.report import GENERATED, RESULT
from megatron_aspo.evaluation.target import Target
from megatron_aspo.observe.trackers import TrackedRun, Trackers, check_packages

TABLE = "results.csv"
_PATTERNS = ("exports/step_*", "checkpoints/step_*", "step_*", "global_step_*")
"""Patterns of checkpoint directories below the watched directory."""
_POLL_S = 60.0
TRIES = 3
"""Number of failed evaluations of a checkpoint, over all watchers, after which it is skipped."""


@dataclass(frozen=True)
class Candidate:
    """A complete checkpoint."""

    path: Path
    step: int

    @property
    def name(self) -> str:
        """The name of its evaluation."""
        return f"step_{self.step}"


def candidates(directory: Path) -> list[Candidate]:
    """Return the complete checkpoints below `directory`, by step.

    A Megatron checkpoint gets its name when it is complete; a Hugging Face directory is complete when every file of its index exists. If
    a step exists several times, the first of `_PATTERNS` wins.
    """
    found: dict[int, Candidate] = {}
    for pattern in _PATTERNS:
        for path in directory.glob(pattern):
            step = Target(directory=path).step
            if step is not None and (is_checkpoint(path) or _is_complete(path)):
                found.setdefault(step, Candidate(path, step))
    return [found[step] for step in sorted(found)]


def _is_complete(path: Path) -> bool:
    if not (path / "config.json").is_file():
        return False
    index = path / "model.safetensors.index.json"
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.exists() else {"model.safetensors"}
    except (ValueError, KeyError):
        return False  # the index is still being written
    return all((path / name).is_file() for name in files)


def generated(out: Path, directory: Path) -> list[Candidate]:
    """Return, by step, the checkpoints whose responses are all generated; the checkpoints need not be on this machine."""
    names = (path.parent.name for path in out.glob(f"step_*/{GENERATED}"))
    return sorted((Candidate(directory / name, int(name.removeprefix("step_"))) for name in names), key=lambda found: found.step)


class Watcher:
    """Evaluates the new checkpoints of a directory, at each call of `look`."""

    def __init__(
        self,
        directory: Path,
        out: Path,
        command: Callable[[Candidate, Path], Sequence[str]],
        on_result: Callable[[int, dict[str, Any]], None],
        stage: str = "all",
    ):
        """Watch `directory`.

        command: returns the arguments of the process that evaluates a candidate into a directory. on_result: called with step and
        result.json of each evaluation, once over all watchers unless one is killed during the call. stage: as in `megatron-aspo eval`.
        """
        self._directory, self._out, self._command, self._on_result = directory, out, command, on_result
        self._stage, self._end = stage, GENERATED if stage == "generate" else RESULT

    def _candidates(self) -> list[Candidate]:
        return generated(self._out, self._directory) if self._stage == "grade" else candidates(self._directory)

    def look(self) -> list[str]:
        """Evaluate each checkpoint that has no result and no claim of another watcher. Returns the names of those that failed too often."""
        with disk_errors(self._out):
            self._out.mkdir(parents=True, exist_ok=True)
        self._record()
        for candidate in self._candidates():
            if self._is_due(candidate):
                with self._claim(candidate) as claim:
                    if claim and self._is_due(candidate):  # else another watcher was faster
                        self._evaluate(candidate, claim)
                        self._record()
        return [name for candidate in self._candidates() if not self._is_done(name := candidate.name) and self._gave_up(name)]

    def _is_due(self, candidate: Candidate) -> bool:
        there = self._stage == "grade" or candidate.path.exists()
        return there and not self._is_done(candidate.name) and not self._gave_up(candidate.name)

    def _is_done(self, name: str) -> bool:
        return any((self._out / name / end).exists() for end in (self._end, RESULT))

    def _gave_up(self, name: str) -> bool:
        return len(self._failures(name)) >= TRIES

    def _failures(self, name: str) -> list[str]:
        path = self._failures_path(name)
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def _failures_path(self, name: str) -> Path:
        return self._out / (f"{name}.failures" if self._stage == "all" else f"{name}.{self._stage}.failures")

    @contextmanager
    def _claim(self, candidate: Candidate) -> Iterator[IO[str] | None]:
        """Yield the claim's file, or None while another watcher holds it. Generating and grading have separate claims."""
        with (self._out / f"{candidate.name}{'.grade' if self._stage == 'grade' else ''}.claim").open("a", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            yield file

    def _evaluate(self, candidate: Candidate, claim: IO[str]) -> None:
        print(f"{candidate.name}: evaluating {candidate.path}", flush=True)
        status = subprocess.run(self._command(candidate, self._out / candidate.name), pass_fds=[claim.fileno()], check=False).returncode
        if status or not self._is_done(candidate.name):
            failures = [*self._failures(candidate.name), f"exit status {status}"]
            with disk_errors(self._out):
                write_text(self._failures_path(candidate.name), "\n".join(failures) + "\n")
            print(f"{candidate.name}: exit status {status}, {len(failures)} of {TRIES} tries", flush=True)

    def _record(self) -> None:
        """Pass on the results that the table does not contain, then write OUT/results.csv: a row per evaluation, by step."""
        with (self._out / "results.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            results = {int(path.parent.name.removeprefix("step_")): path for path in self._out.glob(f"step_*/{RESULT}")}
            if new := results.keys() - _recorded(self._out / TABLE):
                read = {step: json.loads(results[step].read_text(encoding="utf-8")) for step in sorted(results)}
                for step in sorted(new):
                    self._on_result(step, read[step])
                with disk_errors(self._out):
                    write_text(self._out / TABLE, format_table(read))


def _recorded(table: Path) -> set[int]:
    """Return the steps in the table."""
    if not table.exists():
        return set()
    return {int(row["step"]) for row in csv.DictReader(io.StringIO(table.read_text(encoding="utf-8")))}


def format_table(results: dict[int, dict[str, Any]]) -> str:
    """Return CSV with a row for each step: protocol, each metric with the ends of its interval, lengths, and the model's digest."""
    rows = []
    for step, result in results.items():
        row = {"step": step, "protocol": result["protocol"], "problems": result["result"]["problems"]}
        for name, estimate in result["result"]["metrics"].items():
            row |= {name: estimate["mean"], f"{name} low": estimate["low"], f"{name} high": estimate["high"]}
        row |= {name: result["result"][name] for name in ("tokens_mean", "truncated_share", "repetition_share")}
        rows.append(row | {"model_sha256": result["model"]["sha256"]})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def run_watch(parsed: argparse.Namespace) -> int:
    """Watch `parsed.target` until a signal arrives, or look once. Returns 1 if an evaluation failed too often."""
    directory = Path(parsed.target).expanduser().absolute()
    if parsed.stage != "grade" and not directory.is_dir():
        raise UserError(f"--watch {directory}: there is no such directory; name a run, or a directory in which checkpoints appear")
    if parsed.against:
        raise UserError("--watch evaluates each checkpoint by itself; leave --against out")
    recipe = parsed.recipe or next((path for path in [directory / "config.yaml"] if path.is_file()), None)
    config = load_config(recipe) if recipe else None
    if parsed.stage == "grade" and not parsed.protocol:
        parsed.recipe = recipe  # the checkpoints, which have it too, may not be here
    if config:
        check_packages(config.observe.trackers)
    # Refuse mistakes before waiting.
    held_out = recipe_settings(config) if config and not parsed.protocol else None
    plan = make_plan(parsed.protocol, held_out, parsed.data, parsed.overrides)
    out = (parsed.out or directory / "evaluations" / plan.protocol).expanduser().absolute()
    log = (lambda step, result: log_result(config, directory, step, result)) if config else (lambda step, result: None)
    watcher = Watcher(directory, out, lambda candidate, to: child_command(parsed, candidate, to), log, parsed.stage)
    while True:
        failed = watcher.look()
        if parsed.once and parsed.stage == "generate":
            print(f"{out}: {len(generated(out, directory))} generated" + (f"; failed: {', '.join(failed)}" if failed else ""))
            return 1 if failed else 0
        if parsed.once:
            print(f"{out / TABLE}: {len(_recorded(out / TABLE))} evaluations" + (f"; failed: {', '.join(failed)}" if failed else ""))
            return 1 if failed else 0
        time.sleep(_POLL_S)


def log_result(config: Config, directory: Path, step: int, result: dict[str, Any]) -> None:
    """Send an evaluation to the trackers of the recipe, under the training run's name and step: `val/PROTOCOL/avg@8` and so on."""
    run = TrackedRun(config.name, directory, config.observe.project, {}, trains=False)
    with contextlib.closing(Trackers(config.observe.trackers, run, print)) as trackers:
        metrics = {}
        for name, estimate in result["result"]["metrics"].items():
            prefix = f"val/{result['protocol']}/{name}"
            metrics |= {prefix: estimate["mean"], f"{prefix}/low": estimate["low"], f"{prefix}/high": estimate["high"]}
        trackers.log(step, metrics | {f"val/{result['protocol']}/truncated_share": result["result"]["truncated_share"]})


def child_command(parsed: argparse.Namespace, candidate: Candidate, out: Path) -> list[str]:
    """Return the command that evaluates one candidate with the watcher's options."""
    words = [sys.executable, "-m", "megatron_aspo", "eval", str(candidate.path), "--out", str(out), "--stage", parsed.stage]
    recipe = None if parsed.protocol else parsed.recipe  # with a protocol it only says where results are logged
    for option, value in (("--protocol", parsed.protocol), ("--recipe", recipe), ("--ray-address", parsed.ray_address)):
        words += [option, str(value)] if value else []
    for option, values in (("--data", parsed.data), ("--set", parsed.overrides)):
        words += [option, *values] if values else []
    return words + (["--accept-count"] if parsed.accept_count else [])
