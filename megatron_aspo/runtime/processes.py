"""The second step of a run: starting its processes in order (Ray, reward workers, engines, training ranks), and ending them in reverse."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

from megatron_aspo.common.errors import UserError
from megatron_aspo.config import Config
from megatron_aspo.hf.model import HFModel
from megatron_aspo.observe.memory import PeakMemory
from megatron_aspo.observe.progress import Progress
from megatron_aspo.rewards.pool import RewardPool
from megatron_aspo.rollout.pool import EnginePool
from megatron_aspo.rollout.transfer_spec import TransferSpec
from megatron_aspo.runtime.checks import check_recipe
from megatron_aspo.runtime.cluster import Cluster, computes_bfloat16, open_cluster
from megatron_aspo.runtime.placement import Colocated, Placement, Split, shared_locations
from megatron_aspo.runtime.prepare import Prepared
from megatron_aspo.runtime.publisher import Publisher
from megatron_aspo.runtime.start import Start
from megatron_aspo.runtime.trainers import Trainers
from megatron_aspo.trainer.settings import RankSettings


@dataclass(frozen=True)
class Processes:
    """The processes of a run; the engines hold the weights from which the run starts."""

    rewards: RewardPool
    engines: EnginePool
    trainers: Trainers
    publisher: Publisher
    placement: Placement
    threads: dict[str, int]
    """CPU threads of each training rank and of each engine; the rounding of sums depends on them."""
    memory: PeakMemory | None
    """None on a joined cluster, whose processes are not visible from here."""


@contextmanager
def start(prepared: Prepared, progress: Progress) -> Iterator[Processes]:
    """Start the processes of a prepared run, and end them on leaving or on any failure. Raises UserError for what the user can cure."""
    config, settings = prepared.config, prepared.settings
    with ExitStack() as stack:
        memory = stack.enter_context(contextlib.closing(PeakMemory()))
        cluster = _open_cluster(prepared, progress)
        stack.callback(call_with_signals_ignored, cluster.close)
        check_resources(config, cluster, settings.sizes.world)
        check_recipe(config, prepared.model, settings, cluster.device)  # known only now for a joined cluster
        rewards = RewardPool(config.task, config.data, config.data.reward_workers, config.rollout.responses_per_prompt)
        stack.callback(call_with_signals_ignored, rewards.close)
        if config.ray_address:  # it is not known yet whether its nodes can load the reward: refuse before the long part of the start
            with progress.waiting("starting reward workers"):
                rewards.ready()
        engines = _engine_pool(prepared, cluster)
        stack.callback(call_with_signals_ignored, engines.shutdown)
        threads = {"trainer": config.trainer.threads or max(1, cluster.cores // settings.sizes.world), "rollout": engines.threads}
        warn_if_not_bitwise_resumable(prepared.start, config, settings, threads, progress)
        trainers = _start_trainers_and_engines(prepared, cluster, engines, rewards, threads["trainer"], progress, stack)
        _warn_of_slow_bfloat16(config, cluster, progress)
        spec = transfer_spec(config, prepared.model, settings)
        publisher = Publisher(trainers, engines, spec, config.trainer.timeout_s, config.transfer_verify_every, progress.log)
        colocated = config.placement == "colocated"
        placement = Colocated(trainers, engines, publisher, config.rollout.sleep_level) if colocated else Split(publisher)
        engines.restore = placement.restore
        if prepared.start.step:
            with progress.waiting("bringing the engines to the checkpoint's weights"):
                placement.to_training()
                placement.to_generating(prepared.start.training["weights_version"], changed=True)
        yield Processes(rewards, engines, trainers, publisher, placement, threads, memory if cluster.ours else None)


def _open_cluster(prepared: Prepared, progress: Progress) -> Cluster:
    config = prepared.config
    with progress.waiting("starting Ray"):
        return open_cluster(config.ray_address, prepared.settings.sizes.world + config.rollout.engines, config.rollout.sizes)


def _engine_pool(prepared: Prepared, cluster: Cluster) -> EnginePool:
    """Return the run's engine pool, not started yet."""
    config, end = prepared.config, prepared.tokenizer.eos_token_id
    directory, stop = str(prepared.model.directory), () if end is None else (cast(int, end),)
    return EnginePool(directory, config.rollout, config.max_model_len, cluster.device, config.seed, config.deterministic, stop)


def _start_trainers_and_engines(
    prepared: Prepared, cluster: Cluster, engines: EnginePool, rewards: RewardPool, threads: int, progress: Progress, stack: ExitStack
) -> Trainers:
    """Start both, wait for the reward workers of a Ray that we started, and return the ranks. stack: closes the training ranks."""
    config, settings = prepared.config, prepared.settings
    colocated = config.placement == "colocated"
    with progress.waiting("starting engines, training ranks and reward workers"), ThreadPoolExecutor(1) as pool:
        # On separate devices the engines start in the background: both sides take long, and neither needs the other.
        starting = None if colocated else pool.submit(engines.start)
        try:
            reserve = bool(config.checkpoint.every) and config.checkpoint.asynchronous
            trainers = Trainers.start(settings, cluster.device, threads, prepared.start.checkpoint, reserve)
            stack.callback(call_with_signals_ignored, trainers.close)
            if colocated:
                trainers.offload("optimizer")
                trainers.offload("weights")
            started = starting.result() if starting else engines.start(shared_locations(trainers.locations(), config.rollout.sizes))
            if not config.ray_address:
                rewards.ready()
        except BaseException:
            engines.shutdown()  # else leaving the thread pool would wait for them to come up
            raise
    progress.log(
        f"engines: {len(started)} × vLLM {started[0].vllm_version} on {started[0].device}, {config.rollout.dtype}; training ranks: "
        f"{settings.sizes.world}, " + ", ".join(f"{key} {value}" for key, value in trainers.described.items())
    )
    return trainers


def _warn_of_slow_bfloat16(config: Config, cluster: Cluster, progress: Progress) -> None:
    slow = [f"{room}.dtype" for room in ("trainer", "rollout") if getattr(config, room).dtype == "bfloat16"]
    if slow and cluster.device == "cpu" and not computes_bfloat16():
        progress.log(
            f"this processor does not compute in bfloat16: with {'=float32 '.join(slow)}=float32 the run takes a quarter of the time"
        )


def transfer_spec(config: Config, model: HFModel, settings: RankSettings) -> TransferSpec:
    """Return the specification on which both sides of a run's weight transfers agree."""
    sides = settings.sizes, config.rollout.sizes
    return TransferSpec(
        model.architecture, model.dims, *sides, config.rollout.dtype, config.transfer_bucket_mib << 20, config.placement == "colocated"
    )


def check_resources(config: Config, cluster: Cluster, ranks: int) -> None:
    """Raise UserError if the run needs more than the cluster has: Ray would wait for ever."""
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


def warn_if_not_bitwise_resumable(
    start: Start, config: Config, settings: RankSettings, threads: dict[str, int], progress: Progress
) -> None:
    """Print why a resumed deterministic run cannot equal the uninterrupted one bit for bit, if it cannot."""
    if start.manifest is None or not config.deterministic:
        return
    saved = start.training.get("threads", dict.fromkeys(threads, "not noted"))
    differing = [f"{room}.threads was {saved[room]}, is {count}" for room, count in threads.items() if saved[room] != count]
    if start.manifest.sizes != settings.sizes:
        differing.append("the layout of the training ranks is another")
    if differing:
        progress.log(f"deterministic: from here on the run is not the undisturbed one bit for bit: {', '.join(differing)}")


def call_with_signals_ignored(close: Callable[[], None]) -> None:
    """Call `close` with SIGINT and SIGTERM ignored: a second Ctrl-C must not leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        close()
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        close()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
