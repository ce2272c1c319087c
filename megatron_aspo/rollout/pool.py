"""The engines of a run, seen from the driver: one object that starts them, feeds them, gives them new weights and ends them."""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray
from ray import ObjectRefGenerator  # pyright: ignore[reportAttributeAccessIssue]  Ray's stub lacks it
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from megatron_aspo.common.actors import ActorGroup, Pending, require_cluster
from megatron_aspo.common.errors import UserError
from megatron_aspo.common.process_tree import sweep, sweep_below
from megatron_aspo.data.records import Generation
from megatron_aspo.rollout.engine import EngineError, EngineInfo, Request
from megatron_aspo.rollout.engine_settings import EngineSpec
from megatron_aspo.rollout.liveness import Liveness
from megatron_aspo.rollout.member import Member, explain, run_on
from megatron_aspo.rollout.options import RolloutOptions
from megatron_aspo.rollout.share import share

if TYPE_CHECKING:
    from megatron_aspo.rollout.transfer_spec import TransferSpec

_SHUTDOWN_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 10.0
"""An engine that does not report its health within this time counts as dead."""
_MAX_LOSSES = 3
"""Lost engines in one generation, above which a request is assumed to be the cause."""
_START_TRIES = 3
"""Upper bound on the attempts to restart a lost engine."""
_RESTART_FACTOR, _RESTART_S = 5.0, 60.0
"""A restart may take this multiple of the first start's time, and at least this many seconds: its files are cached by then, but the node
may be busier. Without this bound a start that freezes would hold up the run for `start_timeout_s`."""


_Streams = dict[ObjectRefGenerator, tuple[Member, Sequence[int]]]
"""Running calls of `Engine.generate_many`, with the engine and the positions of the requests that it was given."""
_Lost = dict[int, tuple[Any, list[int]]]
"""Lost engines: index → actor, and positions of the requests that it had."""


class EnginePool:
    """Call `start`, then any method, then `shutdown`. Methods may be called from several threads of the driver.

    Every call that depends on a dead engine raises EngineError until `restart_dead` has replaced it. Generation recovers automatically if
    `restore` is set.
    """

    def __init__(
        self,
        model: str,
        options: RolloutOptions,
        max_model_len: int,
        device: str = "cpu",
        seed: int = 0,
        deterministic: bool = False,
        stop_token_ids: Sequence[int] = (),
        readable: bool = False,
    ):
        """Prepare the engines without starting them; Ray must be running.

        model: its directory. max_model_len: upper bound on prompt plus response, in tokens. stop_token_ids: the tokenizer's end-of-sequence
        ids, in addition to those of the model's generation config. readable: as EngineSpec's.
        """
        if device not in ("cpu", "cuda"):
            raise ValueError(f"device {device!r} is not known; expected 'cpu' or 'cuda'")
        self._options = options
        self.deterministic = deterministic
        """May be changed between calls of `generate`."""
        self.restore: Callable[[str], None] | None = None
        """Called with the reason when an engine is lost while it generates: must restart it and bring all engines to the weights in use.
        None: a loss ends the generation."""
        self._lock, self._restoring = threading.Lock(), threading.Lock()
        self.threads = options.threads or _even_threads(options.engines, options.resource)
        """CPU threads of each engine."""
        self._members = [
            Member(spec, None)
            for spec in (
                EngineSpec(
                    index=index,
                    model=str(Path(model).absolute()),
                    device=device,
                    dtype=options.dtype,
                    tensor_parallel=options.tensor_parallel,
                    expert_parallel=options.expert_parallel,
                    max_model_len=max_model_len,
                    max_running_requests=options.max_running_requests,
                    kv_cache_gib=options.kv_cache_gib,
                    threads=self.threads,
                    seed=seed,
                    stop_token_ids=tuple(stop_token_ids),
                    readable=readable,
                )
                for index in range(options.engines)
            )
        ]

    def start(self, shared_devices: Sequence[tuple[str, str]] | None = None) -> list[EngineInfo]:
        """Start all engines concurrently; return once all have started.

        shared_devices: for each engine, Ray's id of the node and the devices on it that it shares; by default Ray gives it its own. Raises
        UserError with the cause when one does not start within `start_timeout_s`; then none is left running.
        """
        require_cluster()
        for member, devices in zip(self._members, shared_devices or (), strict=False):
            member.shared_devices = devices
        began = time.monotonic()
        try:
            self._start(self._members, self._options.start_timeout_s)
        except TimeoutError as error:
            self.shutdown()
            raise UserError(
                f"{error}, the limit on starting; look for its last lines in Ray's worker logs, raise rollout.start_timeout_s, or free the "
                "CPUs or GPUs that its Ray actor waits for"
            ) from error
        except BaseException:
            self.shutdown()
            raise
        self._start_s = time.monotonic() - began
        return self.infos

    @property
    def infos(self) -> list[EngineInfo]:
        """The report of each engine from its start. Raises EngineError while one is not running."""
        return [member.report for member in self._members]

    def restart_dead(self) -> list[str]:
        """If any engine is dead or does not answer, restart it and every engine that holds a mixture of weights; return their names.

        Else a no-op that returns []. Restarted engines hold the weights of the model's directory. Raises EngineError when they do not start
        in three attempts, each bounded by the time of the first start.
        """
        unfit, dead = [], []
        for member in self._members:
            try:
                self._on("health", [member]).result(_ANSWER_TIMEOUT_S)
            except (EngineError, TimeoutError) as error:
                unfit.append(member)
                if isinstance(error, TimeoutError) or not self._is_alive(member):
                    dead.append(member)
        if not dead:
            return []
        self._end([member for member in unfit if member not in dead])
        self._end(dead, ask=False)
        self._start_again(unfit)
        return [member.name for member in unfit]

    def _start_again(self, members: Sequence[Member]) -> None:
        limit_s = min(self._options.start_timeout_s, max(_RESTART_S, _RESTART_FACTOR * self._start_s))
        failure: Exception | None = None
        for _ in range(_START_TRIES):
            try:
                self._start(members, limit_s)
                return
            except (TimeoutError, EngineError, UserError) as error:  # it started once, so that no mistake of the user keeps it from that
                failure = error
                self._end(members, ask=False)
        self.shutdown()
        raise EngineError(f"an engine was lost and did not start again in {_START_TRIES} tries: {failure}") from failure

    def _is_alive(self, member: Member) -> bool:
        """Whether its engine core still answers."""
        try:
            ray.get(member.actor.version.remote(), timeout=_ANSWER_TIMEOUT_S)
        except (RayActorError, RayTaskError, GetTimeoutError):
            return False
        return True

    def _start(self, members: Sequence[Member], limit_s: float) -> None:
        """Make the actors of engines, and wait until all have started. Raises TimeoutError, and what an engine raises."""
        for member in members:
            member.create_actor(self._options.resource)
        for member, info in zip(members, self._on("start", members).result(limit_s), strict=True):
            member.info = info

    def generate(
        self,
        requests: Sequence[Request],
        group_size: int = 1,
        on_response: Callable[[int, Generation], None] = lambda position, generation: None,
    ) -> list[Generation]:
        """Return one response per request, in order. Every `group_size` consecutive requests share a prompt and stay on one engine.

        Deterministic: each engine gets its fixed share at once and starts it in one step. Otherwise each group goes to the engine with the
        fewest unfinished requests, as soon as that engine has room for it. on_response: called in this thread with the position and the
        response of each request as soon as it is finished. Raises EngineError when an engine fails, and what on_response raises; unfinished
        requests are then cancelled. With `restore` the requests of an engine that dies or freezes are sent again; in a deterministic pool,
        its whole share to its replacement.
        """
        generations: dict[int, Generation] = {}
        with contextlib.closing(self.stream(requests, group_size)) as responses:
            for position, generation in responses:
                generations[position] = generation
                on_response(position, generation)
        return [generations[position] for position in range(len(requests))]

    def stream(self, requests: Sequence[Request], group_size: int = 1) -> Generator[tuple[int, Generation], None, None]:
        """Yield (position in `requests`, response) for each response as soon as it is finished; otherwise as `generate`.

        Unfinished requests are cancelled when the generator is closed.
        """
        engine_of = share(len(requests), len(self._members), group_size)
        return self._generate_fixed(requests, engine_of) if self.deterministic else self._generate_least_loaded(requests, group_size)

    def connect(self, host: str, port: int, spec: "TransferSpec", timeout_s: float, apart: bool = False) -> Pending:
        """Let the workers of every engine join the group of the spec, which training rank 0 opens at `host:port`.

        apart: as if each engine were on a separate machine, for measurements.
        """
        return self._on_all("connect", host, port, spec, timeout_s, apart)

    def receive_weights(self, version: int, verify: bool) -> Pending:
        """Let every engine receive what the training ranks send as `version`."""
        return self._on_all("receive_weights", version, verify)

    def stored_digests(self) -> list:
        """Return, for each worker of each engine, (tensor, box, SHA-256) of the weights in its memory that can be read."""
        return self._on_all("stored_digests").result()

    def received_digests(self) -> list:
        """Return, for each worker of each engine, (tensor, box, SHA-256) of the boxes of the last version, if it was verified."""
        return self._on_all("received_digests").result()

    def pause(self) -> None:
        """Halt decoding on every engine; return once all have halted."""
        self._answers_of_all("pause")

    def resume(self) -> None:
        """Undo `pause`."""
        self._answers_of_all("resume")

    def sleep(self, level: int = 1) -> None:
        """Let every engine free its device memory; at level 2 it drops its weights."""
        self._answers_of_all("sleep", level)

    def wake(self, tags: tuple[str, ...] = ("weights", "kv_cache")) -> None:
        """Let every engine allocate the memory of its `weights`, its `kv_cache` or both again."""
        self._answers_of_all("wake", tags)

    def versions(self) -> list[int]:
        """Return the version of the weights in use on each engine; 0: those with which it started."""
        return self._answers_of_all("version")

    def health(self) -> list[dict[str, Any]]:
        """Return the state that each engine reports. Raises EngineError for a dead one."""
        return self._answers_of_all("health")

    @property
    def size(self) -> int:
        """The number of engines."""
        return len(self._members)

    def shutdown(self) -> None:
        """End all engines, their child processes and shared memory. Idempotent; may be called at any time."""
        self._end([member for member in self._members if member.actor is not None])

    def _end(self, running: Sequence[Member], ask: bool = True) -> None:
        """ask: give each the time to shut down, which a dead or frozen engine would not use."""
        if not running:
            return
        # An engine that is still starting answers once it has started: killed before, its engine core would notice only later.
        stopping = [member.actor.shutdown.remote() for member in running] if ask else []
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=_SHUTDOWN_TIMEOUT_S)
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        # What an engine that has not started has made so far is known only as long as its actor lives.
        unfinished = [home for member in running if not member.info and (home := member.find_home()) and home[0] in alive]
        ray.get([run_on(node, sweep_below, pid) for node, pid in unfinished], timeout=_SHUTDOWN_TIMEOUT_S)
        for member in running:
            ray.kill(member.actor)
        # vLLM leaves processes and shared memory behind where it was killed: look on each engine's node.
        sweeps = [run_on(info.node_id, sweep, info.remains) for member in running if (info := member.info) and info.node_id in alive]
        for member in running:
            member.actor = None
            member.info = None
        ray.get(sweeps, timeout=_SHUTDOWN_TIMEOUT_S)

    def _generate_fixed(self, requests: Sequence[Request], engine_of: list[int]) -> Generator[tuple[int, Generation], None, None]:
        shares: dict[int, list[int]] = {}
        for position, engine in enumerate(engine_of):
            shares.setdefault(engine, []).append(position)
        given: set[int] = set()
        losses: list[EngineError] = []
        while shares:
            lost: _Lost = {}
            under_way: _Streams = {}
            for engine, positions in shares.items():
                member = self._members[engine]
                stream = member.actor.generate_many.remote([requests[position] for position in positions], True)
                under_way[stream] = (member, positions)
            liveness = Liveness(self._options.answer_timeout_s)
            try:
                while under_way:
                    for position, generation in self._responses(under_way, liveness, lost, losses):
                        # The share of a lost engine is generated again from its beginning, with the same result.
                        if position not in given:
                            given.add(position)
                            yield position, generation
            finally:
                _withdraw(under_way)
            if lost:
                self._recover([actor for actor, _ in lost.values()], losses)
            shares = {engine: positions for engine, (_, positions) in lost.items()}

    def _generate_least_loaded(self, requests: Sequence[Request], group_size: int) -> Generator[tuple[int, Generation], None, None]:
        waiting = deque(range(0, len(requests), group_size))
        given: set[int] = set()
        losses: list[EngineError] = []
        gone: dict[int, Any] = {}
        """Lost engines and their actors; they get no more requests before they are restarted."""
        under_way: _Streams = {}
        liveness = Liveness(self._options.answer_timeout_s)
        try:
            while waiting or under_way:
                while waiting and (member := self._claim(group_size, gone)) is not None:
                    positions = range(first := waiting.popleft(), first + group_size)
                    stream = member.actor.generate_many.remote([requests[position] for position in positions])
                    under_way[stream] = (member, positions)
                if not under_way:
                    if len(gone) < len(self._members):  # other callers fill every engine: look again soon
                        time.sleep(0.05)
                        continue
                    self._recover(gone.values(), losses)
                    gone.clear()
                    continue
                lost: _Lost = {}
                before = dict(under_way)
                for position, generation in self._responses(under_way, liveness, lost, losses):
                    if position not in given:
                        given.add(position)
                        yield position, generation
                for member, _ in (before[stream] for stream in before.keys() - under_way.keys()):
                    self._give_back(member, group_size)
                for engine, (actor, positions) in lost.items():
                    gone[engine] = actor
                    groups = {position - position % group_size for position in positions}
                    waiting.extend(first for first in sorted(groups) if not given.issuperset(range(first, first + group_size)))
            if gone:
                self._recover(gone.values(), losses)
        finally:
            _withdraw(under_way)
            for member, _ in under_way.values():
                self._give_back(member, group_size)

    def _responses(
        self, under_way: _Streams, liveness: Liveness, lost: _Lost, losses: list[EngineError]
    ) -> Iterator[tuple[int, Generation]]:
        """Wait a moment; yield positions and responses that are ready. Removes the streams that have ended from `under_way`.

        Streams of a dead or frozen engine are removed too: their positions are added to `lost`, the reason to `losses`. Raises the error of
        an engine that is alive, and the loss of an engine where nothing can replace it.
        """
        # With a timeout, because another caller may have made room meanwhile, and an engine may be frozen.
        done, _ = ray.wait(list(under_way), num_returns=1, timeout=1.0)
        for stream in cast(list[ObjectRefGenerator], done):
            member, positions = under_way[stream]
            try:
                number, generation = ray.get(next(stream))
            except StopIteration:
                del under_way[stream]
                continue
            except (RayActorError, RayTaskError) as error:
                reason = explain(member.name, error)
                if self.restore is None or not isinstance(reason, EngineError) or self._is_alive(member):
                    raise reason from error
                self._lose(member, reason, under_way, lost, losses)
                continue
            yield positions[number], generation
        busy = {member.spec.index: member.actor for member, _ in under_way.values()}
        for index in liveness.frozen(busy):
            reason = EngineError(f"engine {index} has not answered for {self._options.answer_timeout_s:g} s (rollout.answer_timeout_s)")
            if self.restore is None:
                raise reason
            self._lose(self._members[index], reason, under_way, lost, losses)

    def _lose(self, member: Member, reason: EngineError, under_way: _Streams, lost: _Lost, losses: list[EngineError]) -> None:
        losses.append(reason)
        for stream in [stream for stream, (owner, _) in under_way.items() if owner is member]:
            lost.setdefault(member.spec.index, (member.actor, []))[1].extend(under_way.pop(stream)[1])
            _withdraw([stream])  # it may be frozen only temporarily

    def _recover(self, lost: Iterable[Any], losses: list[EngineError]) -> None:
        """Let `restore` replace the engines whose actors were lost, unless another caller has done so.

        Raises the last loss when there were too many in one call.
        """
        if self.restore is None:
            raise losses[-1]
        if len(losses) > _MAX_LOSSES:
            raise EngineError(f"engines were lost {len(losses)} times in one generation, at last: {losses[-1]}") from losses[-1]
        with self._restoring:
            if not {member.actor for member in self._members}.isdisjoint(lost):
                self.restore(str(losses[-1]))

    def _claim(self, count: int, gone: Collection[int]) -> Member | None:
        """Reserve `count` requests on the least loaded engine that is not gone; None if it has all it can run and a group more."""
        with self._lock:
            left = [member for member in self._members if member.spec.index not in gone]
            member = min(left, key=lambda member: (member.load, member.spec.index), default=None)
            if member is None or member.load >= self._options.max_running_requests + count:
                return None
            member.load += count
            return member

    def _give_back(self, member: Member, count: int) -> None:
        with self._lock:
            member.load -= count

    def _answers_of_all(self, method: str, *arguments: Any) -> list[Any]:
        """Return each engine's answer. Raises EngineError for an engine that does not answer in time."""
        try:
            return self._on_all(method, *arguments).result(self._options.answer_timeout_s)
        except TimeoutError as error:
            raise EngineError(f"{error} (rollout.answer_timeout_s) to {method}") from error

    def _on_all(self, method: str, *arguments: Any) -> Pending:
        return self._on(method, self._members, *arguments)

    def _on(self, method: str, members: Sequence[Member], *arguments: Any) -> Pending:
        return ActorGroup([(member.name, member.actor) for member in members], explain).call(method, *arguments)


def _even_threads(engines: int, resource: str) -> int:
    """Return this node's cores divided by the engines of a node, at least 1. resource: what such a node must have, if anything."""
    nodes = sum(1 for node in ray.nodes() if node["Alive"] and (not resource or node["Resources"].get(resource)))
    per_node = -(-engines // max(1, nodes))
    return max(1, len(os.sched_getaffinity(0)) // per_node)


def _withdraw(streams: Iterable[ObjectRefGenerator]) -> None:
    """Cancel running calls; a no-op for calls that are done or whose engine is dead."""
    for stream in streams:
        ray.cancel(stream)
