"""A run that is prepared, started and has its directory open, with the operations that the loop needs."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_aspo.config import Config
from megatron_aspo.data.tokenizer_export import tokenizer_files
from megatron_aspo.evaluation.accuracy import Evaluation
from megatron_aspo.evaluation.live import evaluate_live
from megatron_aspo.evaluation.records import EvalResponse
from megatron_aspo.evaluation.sampling import EngineResponder, Sampling
from megatron_aspo.observe.memory import PeakMemory
from megatron_aspo.observe.metrics import MetricsFile
from megatron_aspo.observe.progress import Progress
from megatron_aspo.observe.trackers import Trackers
from megatron_aspo.rewards.pool import RewardPool
from megatron_aspo.rollout.collector import Rollouts
from megatron_aspo.rollout.pool import EnginePool
from megatron_aspo.runtime.checkpoint_store import CheckpointStore
from megatron_aspo.runtime.directory import RunFiles, open_directory, own_existing_directory
from megatron_aspo.runtime.ledger import Ledger
from megatron_aspo.runtime.placement import Placement
from megatron_aspo.runtime.prepare import Prepared, prepare
from megatron_aspo.runtime.processes import Processes, call_with_signals_ignored, start
from megatron_aspo.runtime.publisher import Publisher
from megatron_aspo.runtime.start import Start
from megatron_aspo.runtime.trainers import Trainers
from megatron_aspo.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LAST_CHECKPOINT_S = 60.0
"""Seconds that an ending run waits for a checkpoint in progress."""


@contextmanager
def open_run(config: Config) -> Iterator["Run"]:
    """Prepare the run, start its processes and open its directory; end all of that on leaving.

    A failure on the way leaves no process and no file behind. Raises UserError for what the user can cure.
    """
    with ExitStack() as at_the_end:
        owner = own_existing_directory(config, at_the_end)
        progress = Progress(config.steps)
        with progress.waiting("checking model and data"):
            prepared = prepare(config)
            for remark in prepared.remarks:
                progress.log(remark)
        if prepared.checked.torch_dist:
            with progress.waiting("bringing the checkpoint into Hugging Face format"):
                prepared = replace(prepared, checked=prepared.checked.in_hugging_face_format())
        at_the_end.callback(progress.close)
        with (
            start(prepared, progress) as processes,
            open_directory(config, prepared.start, owner, processes.trainers, progress, at_the_end) as files,
            ExitStack() as stack,
        ):
            run = _joined(prepared, processes, files, progress)
            stack.callback(call_with_signals_ignored, run.finish_checkpoint)
            yield run


def is_complete(config: Config) -> bool:
    """Return whether `resume: auto` finds the run complete: the final model exists."""
    return config.resume == "auto" and config.export_directory.is_dir()


@dataclass(frozen=True)
class Run:
    """The parts of a started run."""

    config: Config
    start: Start
    tokenizer: "PreTrainedTokenizerBase"
    chat_template: str
    identity: dict[str, Any]
    model_directory: Path
    task: Task
    engines: EnginePool
    rewards: RewardPool
    rollouts: Rollouts
    trainers: Trainers
    publisher: Publisher
    placement: Placement
    threads: dict[str, int]
    memory: PeakMemory | None
    metrics: MetricsFile
    ledger: Ledger
    checkpoints: CheckpointStore
    trackers: Trackers
    progress: Progress

    @property
    def directory(self) -> Path:
        return self.config.directory

    def evaluation_path(self, done: int) -> Path:
        """Return the path of the evaluation after `done` steps."""
        return self.directory / "evaluations" / f"step_{done}.json"

    def evaluation(self, done: int) -> Evaluation | None:
        """Return the evaluation after `done` steps, if this run directory has it."""
        path = self.evaluation_path(done)
        return Evaluation.read(path) if path.exists() else None

    def record(self, metrics: dict[str, Any]) -> None:
        """Write a step's metrics to metrics.jsonl and send them to the trackers, which already have those of evaluations."""
        self.metrics.write(metrics)
        self.trackers.log(metrics["step"] + 1, {name: value for name, value in metrics.items() if not name.startswith("evaluation/")})

    def evaluate(self, phase: Callable[[str], None]) -> list[EvalResponse]:
        """Return graded responses of the engines to the held-out prompts. phase: called with "generating" and "scoring"."""
        options, config = self.config.evaluation, self.config
        sampling = Sampling(options.draws, options.temperature, 1.0, config.rollout.max_response_tokens, config.seed)
        responder = EngineResponder(self.engines, self.tokenizer)
        return evaluate_live(self.task.held_out(), sampling, responder, self.rewards, config.deterministic, phase, self.progress.log)

    def save_if_due(self, done: int) -> None:
        """Start a checkpoint if the recipe requires one after `done` steps, with the state from which the run resumes."""
        if not self.checkpoints.is_due(done, last=done == self.config.steps):
            return
        self.progress.phase(done - 1, "saving a checkpoint")
        started = time.perf_counter()
        self.report_checkpoint(wait=True)
        self.placement.to_training()
        position = {"weights_version": self.publisher.version, "drawn": self.rollouts.drawn, "ledger_lines": self.ledger.lines}
        self.checkpoints.save(done, self.identity | position | {"threads": self.threads})
        self.placement.to_generating(self.publisher.version, changed=False)
        self.progress.log(f"step {done}: checkpoint, training waited {time.perf_counter() - started:.2f} s")

    def report_checkpoint(self, wait: bool = False, timeout_s: float | None = None) -> None:
        """Record a checkpoint that has been completed since the last call."""
        if path := self.checkpoints.completed(wait, timeout_s):
            self.ledger.append("checkpoint", name=path.name)

    def export(self, card: str) -> None:
        """Write the final model; card: its README.md, with `{hashes}` where the tensors' hashes go."""
        files, warning = tokenizer_files(self.model_directory, self.tokenizer, self.chat_template)
        if warning:
            self.progress.log(warning)
            card += f"\n## Tokenizer\n\n{warning}.\n"
        self.trainers.export(self.config.export_directory, self.config.trainer.dtype, files | {"README.md": card})

    def finish_checkpoint(self) -> None:
        """Give a checkpoint in progress time to reach the disk, for whatever reason the run ends."""
        try:
            self.report_checkpoint(wait=True, timeout_s=_LAST_CHECKPOINT_S)
        except Exception as error:
            self.progress.log(f"the checkpoint that was being written is lost: {error}")


def _joined(prepared: Prepared, processes: Processes, files: RunFiles, progress: Progress) -> Run:
    config, manifest = prepared.config, prepared.start.manifest
    drawn = manifest.training["drawn"] if manifest else 0
    parts = (prepared.task, processes.engines, processes.rewards, prepared.tokenizer)
    return Run(
        config=config,
        start=prepared.start,
        tokenizer=prepared.tokenizer,
        chat_template=prepared.chat_template,
        identity=prepared.identity,
        model_directory=prepared.model.directory,
        task=prepared.task,
        rollouts=Rollouts(*parts, config.rollout, config.algorithm, config.seed, progress.log, drawn),
        progress=progress,
        **vars(processes),
        **vars(files),
    )
