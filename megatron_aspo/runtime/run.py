"""Everything a run needs, brought up in order and taken down in reverse: Ray, engines, training ranks, the run directory."""

import contextlib
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_aspo.config import Config, to_yaml
from megatron_aspo.data.model_directory import resolve_model
from megatron_aspo.data.tasks import build_task
from megatron_aspo.data.tokenizer import load_tokenizer
from megatron_aspo.errors import UserError
from megatron_aspo.observe.memory import PeakMemory
from megatron_aspo.observe.metrics import MetricsFile
from megatron_aspo.observe.progress import Progress
from megatron_aspo.rewards.worker import RewardPool
from megatron_aspo.rollout.collector import Rollouts
from megatron_aspo.rollout.pool import EnginePool
from megatron_aspo.runtime.cluster import Cluster, open_cluster
from megatron_aspo.runtime.trainers import Trainers
from megatron_aspo.trainer.settings import RankSettings
from megatron_aspo.weights.hf_files import TensorReader
from megatron_aspo.weights.hf_model import read_model
from megatron_aspo.weights.layout import check_divisible
from megatron_aspo.weights.publish import Publisher


@dataclass(frozen=True)
class Run:
    """The parts of a run, all up."""

    config: Config
    directory: Path
    rollouts: Rollouts
    trainers: Trainers
    publisher: Publisher
    metrics: MetricsFile
    progress: Progress
    memory: PeakMemory | None
    """None on a cluster that others started: its processes are not ours to see."""


@contextmanager
def open_run(config: Config) -> Iterator[Run]:
    """Check everything that can be checked without starting a process, start everything, and create the run directory last.

    Whatever fails on the way leaves no process and no file behind. Raises UserError for what the user can cure.
    """
    _check_run_directory(config)
    progress = Progress(config.steps)
    model_directory = resolve_model(config.model)
    settings = RankSettings(
        model_directory,
        config.trainer,
        config.optimizer,
        config.algorithm,
        config.rollout.temperature,
        config.seed,
        config.rollout.responses_per_prompt,
        config.rollout.max_response_tokens,
    )
    with progress.waiting("checking model and data"):
        model = read_model(model_directory)
        TensorReader(model)
        check_divisible(model.dims, settings.sizes)
        _check_engine_cut(config, model.dims.heads, model.dims.kv_heads)
        if config.max_model_len > model.max_positions:
            raise UserError(
                f"data.max_prompt_tokens + rollout.max_response_tokens = {config.max_model_len} is more than the model's "
                f"{model.max_positions} positions; lower one of them"
            )
        tokenizer = load_tokenizer(model_directory)
        task = build_task(config.task, config.data, tokenizer, config.seed)
        if config.evaluation.draws:
            _check_held_out(task.held_out())
        if ":" in config.algorithm.policy_loss:
            from megatron_aspo.losses.custom import find_policy_loss  # imports torch

            find_policy_loss(config.algorithm)
    with ExitStack() as stack:
        stack.callback(progress.close)
        memory = stack.enter_context(contextlib.closing(PeakMemory()))
        with progress.waiting("starting Ray"):
            cluster = open_cluster(config.ray_address, settings.sizes.world + config.rollout.engines)
            stack.callback(_undisturbed, cluster.close)
        _check_resources(config, cluster, settings.sizes.world)
        rewards = stack.enter_context(RewardPool(config.task, config.data, config.data.reward_workers))
        eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        engines = EnginePool(
            str(model_directory), config.rollout, config.max_model_len, cluster.device, config.seed, config.deterministic, eos
        )
        stack.callback(_undisturbed, engines.shutdown)
        threads = config.trainer.threads or max(1, cluster.cores // settings.sizes.world)
        with progress.waiting("starting engines and training ranks"), ThreadPoolExecutor(1) as pool:
            # The engines start in the background: both take long, and neither needs the other.
            starting = pool.submit(engines.start)
            try:
                trainers = Trainers.start(settings, cluster.device, threads)
                stack.callback(_undisturbed, trainers.close)
                started = starting.result()
            except BaseException:
                engines.shutdown()  # else leaving the thread pool would wait for them to come up
                raise
        progress.say(
            f"engines: {len(started)} × vLLM {started[0].vllm_version} on {started[0].device}, {config.rollout.dtype}; training ranks: "
            f"{settings.sizes.world}, " + ", ".join(f"{key} {value}" for key, value in trainers.described.items())
        )
        publisher = Publisher(
            trainers,
            engines,
            engine_workers=config.rollout.engines * config.rollout.tensor_parallel,
            dtype=config.rollout.dtype,
            bucket_bytes=config.transfer_bucket_mib << 20,
            timeout_s=config.trainer.timeout_s,
        )
        directory = _make_run_directory(config)
        metrics = stack.enter_context(contextlib.closing(MetricsFile(directory / "metrics.jsonl")))
        rollouts = Rollouts(task, engines, rewards, tokenizer, config.rollout, config.algorithm, config.seed)
        try:
            yield Run(config, directory, rollouts, trainers, publisher, metrics, progress, memory if cluster.ours else None)
        except UserError:
            # A mistake that only the first responses show, such as a reward that fails: the corrected run may have the name.
            if not (directory / "metrics.jsonl").stat().st_size:
                shutil.rmtree(directory)
            raise


def _check_resources(config: Config, cluster: Cluster, ranks: int) -> None:
    """Refuse at once what Ray could never place: it would wait for ever."""
    engines, per_engine = config.rollout.engines, config.rollout.tensor_parallel if cluster.device == "cuda" else 1
    needed = ranks + engines * per_engine
    kind = "GPU" if cluster.device == "cuda" else "CPU"
    if needed > cluster.slots:
        raise UserError(
            f"{ranks} training ranks and {engines} engines need {needed} {kind}s of the Ray cluster, which has {cluster.slots}; "
            "lower trainer.data_parallel or rollout.engines, or start Ray with more"
        )


def _check_engine_cut(config: Config, heads: int, kv_heads: int) -> None:
    size = config.rollout.tensor_parallel
    if heads % size or (kv_heads % size and size % kv_heads):
        raise UserError(f"rollout.tensor_parallel={size} does not divide the model's {heads} attention and {kv_heads} key-value heads")


def _check_held_out(prompts: list) -> None:
    if len(prompts) < 2:
        raise UserError(f"there are {len(prompts)} held-out prompts; a standard error needs at least 2, or set evaluation.draws=0")


def _check_run_directory(config: Config) -> None:
    try:
        if longest := max((part for part in config.directory.parts if len(part.encode()) > 255), default=""):
            raise OSError(f"a part of it has {len(longest.encode())} bytes, over the 255 that file systems take")
        exists = config.directory.exists()
    except (OSError, RuntimeError) as error:
        raise UserError(f"name={config.name} run_dir={config.run_dir} is no usable path: {error}; choose another") from error
    if exists:
        raise UserError(f"run directory {config.directory} exists; choose another name or run_dir, or remove it")


def _make_run_directory(config: Config) -> Path:
    directory = config.directory
    try:
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    except FileExistsError as error:
        raise UserError(f"run directory {directory} exists; choose another name or run_dir, or remove it") from error
    except OSError as error:
        raise UserError(f"run directory {directory} cannot be made: {error.strerror}; choose another run_dir") from error
    return directory


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
