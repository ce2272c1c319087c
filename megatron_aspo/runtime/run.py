"""Everything a run needs, brought up in order and taken down in reverse: Ray, engines, training ranks, the run directory."""

import contextlib
import hashlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_aspo.checkpoint.request import ATTEMPT
from megatron_aspo.checkpoint.torch_dist import TorchDistReader
from megatron_aspo.common.atomic import disk_errors, write_text
from megatron_aspo.common.errors import UserError
from megatron_aspo.config import Config, to_yaml
from megatron_aspo.data.encoder import PromptEncoder
from megatron_aspo.data.tokenizer import load_tokenizer
from megatron_aspo.data.tokenizer_export import tokenizer_files
from megatron_aspo.evaluation.accuracy import Evaluation
from megatron_aspo.evaluation.live import evaluate_live
from megatron_aspo.evaluation.records import EvalResponse
from megatron_aspo.evaluation.sampling import EngineResponder, Sampling
from megatron_aspo.hf.model import HFModel, read_model
from megatron_aspo.hf.tensor_file import sha256_of_parts
from megatron_aspo.hf.tensor_files import TensorReader
from megatron_aspo.observe.memory import PeakMemory
from megatron_aspo.observe.metrics import MetricsFile
from megatron_aspo.observe.progress import Progress
from megatron_aspo.observe.trackers import TrackedRun, Trackers, check_packages
from megatron_aspo.rewards.pool import RewardPool
from megatron_aspo.rewards.process import check_reward
from megatron_aspo.rollout.collector import Rollouts
from megatron_aspo.rollout.pool import EnginePool
from megatron_aspo.runtime.checkpoint_store import CheckpointStore, set_aside, sweep_unfinished
from megatron_aspo.runtime.checks import check_recipe, check_run, expected_device
from megatron_aspo.runtime.cluster import Cluster, computes_bfloat16, open_cluster
from megatron_aspo.runtime.ledger import Ledger
from megatron_aspo.runtime.machine import check_can_be_made
from megatron_aspo.runtime.placement import Colocated, Placement, Split, shared_places
from megatron_aspo.runtime.plan import Plan, check_room
from megatron_aspo.runtime.publisher import Publisher
from megatron_aspo.runtime.start import Ownership, Start, directory_exists, find_start
from megatron_aspo.runtime.trainers import Trainers
from megatron_aspo.sync.schedule import TransferSpec
from megatron_aspo.tasks.task import Task, build_task
from megatron_aspo.trainer.settings import RankSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LAST_CHECKPOINT_S = 60.0
"""How long a run that ends waits for the checkpoint that is being written."""
_FINGERPRINT_PROMPTS = 256
"""Number of prompts in a checkpoint's fingerprint of the data. A finite set adds a digest of all its prompts."""


@dataclass(frozen=True)
class Run:
    """The parts of a run, all up."""

    config: Config
    directory: Path
    model_directory: Path
    tokenizer: "PreTrainedTokenizerBase"
    chat_template: str
    """The one that `data.chat_template` named, as it was at the start; empty if it names none."""
    start: Start
    identity: dict[str, Any]
    """What a resumed run must have in common with the one that it goes on with."""
    threads: dict[str, int]
    """CPU threads of each training rank and of each engine: on them hangs how sums are rounded."""
    task: Task
    engines: EnginePool
    rewards: RewardPool
    rollouts: Rollouts
    trainers: Trainers
    publisher: Publisher
    placement: Placement
    metrics: MetricsFile
    ledger: Ledger
    checkpoints: CheckpointStore
    progress: Progress
    trackers: Trackers
    memory: PeakMemory | None
    """None on a cluster that others started: its processes are not ours to see."""

    def evaluation_path(self, done: int) -> Path:
        """Where the evaluation after `done` steps is kept."""
        return self.directory / "evaluations" / f"step_{done}.json"

    def evaluation(self, done: int) -> Evaluation | None:
        """The evaluation after `done` steps, if this run directory has it."""
        path = self.evaluation_path(done)
        return Evaluation.read(path) if path.exists() else None

    def record(self, metrics: dict[str, Any]) -> None:
        """Write a step's metrics to metrics.jsonl and hand them to the trackers, which have had those of evaluations already."""
        self.metrics.write(metrics)
        self.trackers.log(metrics["step"] + 1, {name: value for name, value in metrics.items() if not name.startswith("evaluation/")})

    def evaluate(self, phase: Callable[[str], None]) -> list[EvalResponse]:
        """Return graded responses of the engines to the held-out prompts. phase: called with "generating" and "scoring"."""
        options, config = self.config.evaluation, self.config
        sampling = Sampling(options.draws, options.temperature, 1.0, config.rollout.max_response_tokens, config.seed)
        responder = EngineResponder(self.engines, self.tokenizer)
        return evaluate_live(self.task.held_out(), sampling, responder, self.rewards, config.deterministic, phase, self.progress.say)

    def save_if_due(self, done: int) -> None:
        """Start a checkpoint when the recipe wants one after `done` steps; what the run resumes from goes with it."""
        if not self.checkpoints.is_due(done, last=done == self.config.steps):
            return
        self.progress.phase(done - 1, "saving a checkpoint")
        started = time.perf_counter()
        self.report_checkpoint(wait=True)
        self.placement.to_training()
        place = {"weights_version": self.publisher.version, "drawn": self.rollouts.drawn, "ledger_lines": self.ledger.lines}
        self.checkpoints.save(done, self.identity | place | {"threads": self.threads})
        self.placement.to_generating(self.publisher.version, changed=False)
        self.progress.say(f"step {done}: checkpoint, training waited {time.perf_counter() - started:.2f} s")

    def report_checkpoint(self, wait: bool = False, timeout_s: float | None = None) -> None:
        """Note a checkpoint that has become whole meanwhile."""
        if path := self.checkpoints.completed(wait, timeout_s):
            self.ledger.append("checkpoint", name=path.name)

    def export(self, card: str) -> None:
        """Write the final model; card: its README.md, with `{hashes}` where the tensors' hashes go."""
        files, warning = tokenizer_files(self.model_directory, self.tokenizer, self.chat_template)
        if warning:
            self.progress.say(warning)
            card += f"\n## Tokenizer\n\n{warning}.\n"
        self.trainers.export(self.config.export_directory, self.config.trainer.dtype, files | {"README.md": card})

    def finish_checkpoint(self) -> None:
        """However the run ends: what is in memory already gets the time to reach the disk."""
        try:
            self.report_checkpoint(wait=True, timeout_s=_LAST_CHECKPOINT_S)
        except Exception as error:
            self.progress.say(f"the checkpoint that was being written is lost: {error}")


@contextmanager
def open_run(config: Config) -> Iterator[Run]:
    """Check everything that can be checked without starting a process, start everything, and create the run directory last.

    Whatever fails on the way leaves no process and no file behind. Raises UserError for what the user can cure.
    """
    with ExitStack() as stack:
        owner = None
        if config.resume != "never" and directory_exists(config) and (config.directory / ATTEMPT).is_file():
            owner = stack.enter_context(contextlib.closing(Ownership(config.directory)))
            sweep_unfinished(config.directory)
        start = find_start(config)
        yield from _start_run(config, start, owner, stack)


def transfer_spec(config: Config, model: HFModel, settings: RankSettings) -> TransferSpec:
    """What the two sides of a run's weight transfers agree on."""
    sides = settings.sizes, config.rollout.sizes
    return TransferSpec(
        model.architecture, model.dims, *sides, config.rollout.dtype, config.transfer_bucket_mib << 20, config.placement == "colocated"
    )


def _start_run(config: Config, start: Start, owner: Ownership | None, stack: ExitStack) -> Iterator[Run]:
    progress = Progress(config.steps)
    with progress.waiting("checking model and data"):
        check_packages(config.observe.trackers)
        checked = check_run(config, device := expected_device(config))
        model = checked.model
        if device == "cpu":
            check_room(Plan(config, model, checked.settings, device))
        if not start.in_place:
            check_can_be_made(config.directory)
        tokenizer = load_tokenizer(model.directory)
        encoder = PromptEncoder(tokenizer, model.dims.vocab, config.data)
        task = build_task(config.task, config.data, encoder, config.seed)
        if (
            config.data.reward or config.data.rewards
        ) and not config.ray_address:  # the workers of a cluster to join may live elsewhere, and load it first thing
            check_reward(config.task, config.data)
        identity = _identity(config, task, checked.reader)
        if start.checkpoint is not None:
            _check_identity(start, config, identity, model)
        if config.evaluation.draws:
            _check_held_out(task.held_out())
        for remark in filter(None, (encoder.remark, *task.remarks)):
            progress.say(remark)
    stack.callback(progress.close)
    with progress.waiting("bringing the checkpoint into Hugging Face format") if checked.torch_dist else contextlib.nullcontext():
        checked = checked.in_hugging_face_format()
        model, settings, model_directory = checked.model, checked.settings, checked.model.directory
    # At the very end, when no process of this run can write any more.
    stack.callback(lambda: owner and sweep_unfinished(config.directory))
    memory = stack.enter_context(contextlib.closing(PeakMemory()))
    with progress.waiting("starting Ray"):
        cluster = open_cluster(config.ray_address, settings.sizes.world + config.rollout.engines, config.rollout.sizes)
        stack.callback(_undisturbed, cluster.close)
    _check_resources(config, cluster, settings.sizes.world)
    check_recipe(config, model, settings, cluster.device)  # what a joined cluster computes on is known now
    rewards = RewardPool(config.task, config.data, config.data.reward_workers, config.rollout.responses_per_prompt)
    stack.callback(_undisturbed, rewards.close)
    if config.ray_address:  # whether its nodes can load the reward is not known yet: refuse before the long part of the start
        with progress.waiting("starting reward workers"):
            rewards.ready()
    eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    engines = EnginePool(str(model_directory), config.rollout, config.max_model_len, cluster.device, config.seed, config.deterministic, eos)
    stack.callback(_undisturbed, engines.shutdown)
    threads = {"trainer": config.trainer.threads or max(1, cluster.cores // settings.sizes.world), "rollout": engines.threads}
    _say_what_differs(start, config, settings, threads, progress)
    colocated = config.placement == "colocated"
    with progress.waiting("starting engines, training ranks and reward workers"), ThreadPoolExecutor(1) as pool:
        # On devices of their own the engines start in the background: both take long, and neither needs the other.
        starting = None if colocated else pool.submit(engines.start)
        try:
            reserve = bool(config.checkpoint.every) and config.checkpoint.asynchronous
            trainers = Trainers.start(settings, cluster.device, threads["trainer"], start.checkpoint, reserve)
            stack.callback(_undisturbed, trainers.close)
            if colocated:
                trainers.leave("optimizer")
                trainers.leave("weights")
            started = engines.start(shared_places(trainers.places(), config.rollout.sizes)) if colocated else starting.result()
            if not config.ray_address:
                rewards.ready()
        except BaseException:
            engines.shutdown()  # else leaving the thread pool would wait for them to come up
            raise
    progress.say(
        f"engines: {len(started)} × vLLM {started[0].vllm_version} on {started[0].device}, {config.rollout.dtype}; training ranks: "
        f"{settings.sizes.world}, " + ", ".join(f"{key} {value}" for key, value in trainers.described.items())
    )
    slow = [f"{room}.dtype" for room in ("trainer", "rollout") if getattr(config, room).dtype == "bfloat16"]
    if slow and cluster.device == "cpu" and not computes_bfloat16():
        progress.say(
            f"this processor does not compute in bfloat16: with {'=float32 '.join(slow)}=float32 the run takes a quarter of the time"
        )
    spec = transfer_spec(config, model, settings)
    publisher = Publisher(trainers, engines, spec, config.trainer.timeout_s, config.transfer_verify_every, progress.say)
    placement = Colocated(trainers, engines, publisher, config.rollout.sleep_level) if colocated else Split(publisher)
    engines.restore = placement.restore
    if start.step:
        with progress.waiting("bringing the engines to the checkpoint's weights"):
            placement.to_training()
            placement.to_generating(start.manifest.training["weights_version"], changed=True)
    directory = config.directory
    if not start.in_place:
        _make_run_directory(directory)
    try:
        owner = owner or stack.enter_context(contextlib.closing(Ownership(directory)))
        ledger = stack.enter_context(contextlib.closing(Ledger(directory / "ledger.jsonl")))
        _check_ledger(ledger, start, directory)
        _go_on(directory, start, config, progress)
        metrics = stack.enter_context(contextlib.closing(MetricsFile(directory / "metrics.jsonl", start.step)))
        began = {"attempt": owner.attempt, "checkpoint": str(start.checkpoint or "")}
        ledger.append("resume" if start.checkpoint else "start", step=start.step, **began)
        drawn = start.manifest.training["drawn"] if start.manifest else 0
        rollouts = Rollouts(task, engines, rewards, tokenizer, config.rollout, config.algorithm, config.seed, progress.say, drawn)
        tracked = TrackedRun(config.name, directory, config.observe.project, asdict(config))
        trackers = stack.enter_context(contextlib.closing(Trackers(config.observe.trackers, tracked, progress.say)))
        checkpoints = CheckpointStore(
            directory, config.checkpoint, trainers, owner.attempt, to_yaml(config), lambda done: _accuracy(directory, done)
        )
        run = Run(
            config,
            directory,
            model_directory,
            tokenizer,
            encoder.given_template,
            start,
            identity,
            threads,
            task,
            engines,
            rewards,
            rollouts,
            trainers,
            publisher,
            placement,
            metrics,
            ledger,
            checkpoints,
            progress,
            trackers,
            memory if cluster.ours else None,
        )
        stack.callback(_undisturbed, run.finish_checkpoint)
        yield run
    except UserError:
        # A mistake that only the first responses show, such as a reward that fails: the corrected run may have the name.
        if not start.in_place and not _has_steps(directory):
            shutil.rmtree(directory)
        raise


def _check_resources(config: Config, cluster: Cluster, ranks: int) -> None:
    """Refuse at once what Ray could never place: it would wait for ever."""
    engines, per_engine = config.rollout.engines, config.rollout.tensor_parallel if cluster.device == "cuda" else 1
    shared = config.placement == "colocated"
    needed = ranks + (0 if shared else engines * per_engine)
    kind = "GPU" if cluster.device == "cuda" else "CPU"
    if needed > cluster.slots:
        raise UserError(
            f"{ranks} training ranks and {engines} engines need {needed} {kind}s of the Ray cluster, which has {cluster.slots}; "
            "lower trainer.data_parallel or rollout.engines, or start Ray with more"
        )
    takes = [
        ("trainer.resource", config.trainer.resource, ranks, "training ranks"),
        ("rollout.resource", config.rollout.resource, engines, "engines"),
    ]
    for option, name, _, who in takes:
        # One name may serve both.
        total = sum(count for _, other, count, _ in takes if other == name)
        if name and (available := cluster.resources.get(name, 0)) < total:
            raise UserError(
                f"{option}={name}: {who} take 1 each of it, {total} in all, and the Ray cluster has {available:g}; start its nodes "
                f"with more (tools/start_ray.sh --resources {name}:N=HOSTS), or leave {option} empty"
            )


def _check_held_out(prompts: list) -> None:
    if len(prompts) < 2:
        raise UserError(f"there are {len(prompts)} held-out prompts; a standard error needs at least 2, or set evaluation.draws=0")


def is_complete(config: Config) -> bool:
    """Whether `resume: auto` finds the work done: the final model stands."""
    return config.resume == "auto" and config.export_directory.is_dir()


def _identity(config: Config, task: Task, reader: TensorReader | TorchDistReader) -> dict[str, Any]:
    """Which prompts come in which order, by the values that decide it; and which model, by those of its tensors that are quickly read."""
    digest = hashlib.sha256()
    vectors = [(name, home) for name in reader.dtypes for home in reader.homes(name) if len(home) == 1]
    model = sha256_of_parts(tensor for _, _, tensor in reader.read(vectors))
    for number in range(_FINGERPRINT_PROMPTS):
        prompt = task.prompt(number)
        digest.update(f"{prompt.id} {list(prompt.token_ids)}\n".encode())
    digest.update(task.data_sha256.encode())
    return {"seed": config.seed, "task": config.task, "prompts_sha256": digest.hexdigest(), "model_sha256": model}


def _check_identity(start: Start, config: Config, identity: dict[str, Any], model: HFModel) -> None:
    if start.step > config.steps:
        raise UserError(f"{start.checkpoint} is after step {start.step}, but steps={config.steps}; raise it, or resume from an earlier one")
    other_model = UserError(f"{start.checkpoint} is of another model than {model.directory}; resume with the model that the run began with")
    for key, value in identity.items():
        saved = start.manifest.training[key]
        if saved == value:
            continue
        if key == "model_sha256":
            raise other_model
        what = "the prompts or their tokens are others" if key == "prompts_sha256" else f"{key} was {saved}, the recipe says {value}"
        raise UserError(f"{start.checkpoint}: {what}: prompts would be lost or doubled; resume with what the run began with")
    saved = read_model(start.checkpoint / "huggingface")
    if (saved.architecture, saved.dims) != (model.architecture, model.dims):
        raise other_model


def _say_what_differs(start: Start, config: Config, settings: RankSettings, threads: dict[str, int], progress: Progress) -> None:
    """A deterministic run that cannot be the undisturbed one bit for bit says why."""
    if start.manifest is None or not config.deterministic:
        return
    saved = start.manifest.training.get("threads", dict.fromkeys(threads, "not noted"))
    differing = [f"{room}.threads was {saved[room]}, is {count}" for room, count in threads.items() if saved[room] != count]
    if start.manifest.sizes != settings.sizes:
        differing.append("the layout of the training ranks is another")
    if differing:
        progress.say(f"deterministic: from here on the run is not the undisturbed one bit for bit: {', '.join(differing)}")


def _make_run_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"run directory {directory} exists; choose another name or run_dir, or remove it") from error
    except OSError as error:
        raise UserError(f"run directory {directory} cannot be made: {error.strerror}; choose another run_dir") from error


def _go_on(directory: Path, start: Start, config: Config, progress: Progress) -> None:
    """Write the recipe; put out of the way what another process began after the step from which this one goes on."""
    with disk_errors(directory / "config.yaml"):
        write_text(directory / "config.yaml", to_yaml(config))
    if start.in_place:
        for aside in set_aside(directory, start.step):
            progress.say(f"the steps after {start.step} are done again: what they made is now {aside}")
        begin = f"going on after step {start.step} from {start.checkpoint}" if start.checkpoint else "no checkpoint yet: starting anew"
        progress.say(begin)


def _accuracy(directory: Path, done: int) -> float | None:
    path = directory / "evaluations" / f"step_{done}.json"
    return Evaluation.read(path).accuracy.mean if path.exists() else None


def _check_ledger(ledger: Ledger, start: Start, directory: Path) -> None:
    """Against the checkpoint, where it is one of this run's."""
    ours = start.checkpoint is not None and start.checkpoint.parent.parent == directory
    if ours and ledger.lines < (lines := start.manifest.training["ledger_lines"]):
        raise UserError(
            f"ledger.jsonl has {ledger.lines} lines, at {start.checkpoint.name} it had {lines}: it was changed since; put it back, or go "
            f"on under another name with --resume {start.checkpoint}"
        )


def _has_steps(directory: Path) -> bool:
    metrics = directory / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def _undisturbed(close) -> None:
    """Run a part's shutdown to its end: a second Ctrl-C must not leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        close()
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        close()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
