"""One engine: vLLM's async engine behind a narrow protocol, designed as a Ray actor.

The pool turns `Engine` into an actor; every method is asynchronous and may run concurrently with the others. Importing this module
imports neither vLLM nor torch: `start` imports vLLM, in the actor's process.
"""

import asyncio
import contextlib
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from megatron_aspo.common.device_environment import engine_environment
from megatron_aspo.common.errors import ProcessError, UserError
from megatron_aspo.common.import_path import one_line
from megatron_aspo.common.process_tree import Remains, remains_of
from megatron_aspo.data.records import Generation, VersionSpan
from megatron_aspo.rollout.engine_settings import FORKS_ENGINE_CORE, EngineSpec, engine_arguments
from megatron_aspo.rollout.output_tail import OutputTail, second_hand

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.output_processor import RequestOutputCollector

    from megatron_aspo.rollout.transfer_spec import TransferSpec
    from megatron_aspo.weights.layout import Box

INITIAL_VERSION = 0
"""Version of the weights with which an engine starts."""
_VLLM_INITIAL_VERSION = "default"
_LIVENESS_PERIOD_S = 0.5
_OUTPUT_LAG_S = 0.3
"""The last lines of a dead process may still be in the pipe; wait this long before quoting them."""
_SHUTDOWN_GRACE_S = 5.0
"""Time that the engine core has to end before it is killed."""
_REPLY_GRACE_S = 1.0
"""Time between noticing a dead engine core and the actor's exit, so that pending calls can still answer why."""

_MEMORY = {"weights", "kv_cache"}
"""vLLM's names for the memory that a sleeping engine gives back."""


class EngineError(ProcessError):
    """An engine failed after it had started; names the engine and quotes its error."""


@dataclass(frozen=True)
class Request:
    """One response to sample. The logprob of every sampled token is always returned."""

    id: str
    """Unique among the pending requests; names it in errors."""
    prompt_ids: tuple[int, ...]
    seed: int
    max_tokens: int
    temperature: float
    """Divides the logits; 0: the most likely token is taken."""
    top_p: float = 1.0
    """Tokens are drawn from the smallest set of most likely ones that has this probability; 1: from all."""


@dataclass(frozen=True)
class EngineInfo:
    """A started engine's report about itself."""

    index: int
    pid: int
    node_id: str
    """Ray's id of its node."""
    remains: Remains
    """Its child processes and shared memory."""
    vllm_version: str
    device: str
    threads: int
    """Per worker process."""
    seconds: float
    """From the call of `start` until the engine could answer."""


class Engine:
    """Call `start` once, then any method, then `shutdown`."""

    def __init__(self, spec: EngineSpec):
        self._spec = spec
        self._name = f"engine {spec.index}"
        self._llm: Any = None
        self._tail: OutputTail | None = None
        self._watcher: asyncio.Task | None = None
        self._holds: set[str] = set()
        self._asleep: set[str] = set()
        """The part of `_MEMORY` that `sleep` has given back."""
        self._holding = asyncio.Lock()
        self._spoiled: str | None = None
        self._version = INITIAL_VERSION

    async def home(self) -> tuple[str, int]:
        """Return Ray's id of this node, and this process's id; before the engine has started too."""
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()

    async def start(self) -> EngineInfo:
        """Start vLLM. Raises UserError with the engine's own last error when it does not start."""
        started = time.monotonic()
        spec = self._spec
        if not (Path(spec.model) / "config.json").is_file():
            raise UserError(
                f"{self._name} did not start: {spec.model} holds no config.json; the model must be a directory in Hugging Face format that "
                "every node of the engines can read"
            )
        self._tail = OutputTail()
        if spec.device == "cuda":
            import ray

            from megatron_aspo.common.network import interface_of  # imports torch

            # The workers inherit it; only the engine's own node knows which interface it is.
            os.environ.update(engine_environment(interface_of(ray.util.get_node_ip_address()), os.environ))
        try:
            import vllm
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            with _engine_core_start(spec.device):
                self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(spec)))
        except Exception as error:
            await asyncio.sleep(_OUTPUT_LAG_S)
            cause = one_line(error)
            if second_hand(cause):
                cause = self._tail.cause() or cause
            raise UserError(
                f"{self._name} did not start: {cause}; correct the model directory or the `rollout` options this is about"
            ) from error
        self._watcher = asyncio.create_task(self._exit_with_engine_core())
        import ray

        return EngineInfo(
            index=spec.index,
            pid=os.getpid(),
            node_id=ray.get_runtime_context().get_node_id(),
            remains=remains_of(os.getpid()),
            vllm_version=vllm.__version__,
            device=spec.device,
            threads=spec.threads_per_worker,
            seconds=time.monotonic() - started,
        )

    async def generate(self, request: Request) -> Generation:
        """Return the sampled response. Waits while the engine is paused.

        Raises ValueError for a request that cannot fit, EngineError when the engine died, was spoiled by a failed weight update, or
        returned a logprob that is not finite.
        """
        return await self._collect(request, await self._submit(request))

    async def generate_many(self, requests: Sequence[Request], together: bool = False) -> AsyncIterator[tuple[int, Generation]]:
        """Yield (position in `requests`, response) for each response as soon as it is finished; the first failure ends them all.

        With `together` the requests reach a halted engine with an empty prefix cache, in their order, and start in the same step, so that
        the composition of batches, and with it the last bits of the logprobs, depends on the requests alone.
        """
        tasks: list[asyncio.Task] = []
        try:
            if together:
                await self._hold("submit", clear_cache=True)
                try:
                    for position, request in enumerate(requests):
                        tasks.append(asyncio.create_task(_numbered(position, self._collect(request, await self._submit(request)))))
                finally:
                    await self._release("submit")
            else:
                tasks += [asyncio.create_task(_numbered(position, self.generate(request))) for position, request in enumerate(requests)]
            for finished in asyncio.as_completed(tasks):
                yield await finished
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def pause(self) -> None:
        """Halt decoding after the current step; running requests are kept, new ones wait. Idempotent."""
        await self._hold("pause", clear_cache=False)

    async def resume(self) -> None:
        """Undo `pause`."""
        await self._release("pause")

    async def sleep(self, level: int = 1) -> None:
        """Halt decoding and free the device memory of weights and cache; on CPU only halt. Idempotent.

        Level 1 keeps the weights in host memory. Level 2 keeps nothing: they must be sent again.
        """
        async with self._holding, self._death_explained():
            if self._asleep == _MEMORY:
                return
            if self._asleep:  # half awake, but vLLM's allocator only sleeps as a whole
                await self._llm.wake_up(sorted(self._asleep))
            self._holds.add("sleep")
            self._asleep = set(_MEMORY)
            await self._llm.sleep(level=level, mode="keep")

    async def wake(self, tags: tuple[str, ...] = ("weights", "kv_cache")) -> None:
        """Allocate the memory of `weights`, `kv_cache` or both again, as far as it was freed.

        Decoding goes on once both are allocated and nothing else holds it.
        """
        async with self._holding, self._death_explained():
            missing = [tag for tag in tags if tag in self._asleep]
            self._asleep.difference_update(missing)
            if missing and await self._llm.wake_up(missing):  # fully awake: vLLM has resumed
                self._holds.discard("sleep")
                if self._holds:
                    await self._llm.pause_generation(mode="keep", clear_cache=False)

    async def connect(self, host: str, port: int, spec: "TransferSpec", timeout_s: float, apart: bool) -> None:
        """Join the group of a weight transfer, which training rank 0 opens at `host:port`; apart: as `EnginePool.connect`'s.

        Returns once every rank of the group is there. Raises EngineError when one does not come within `timeout_s`, or disagrees about the
        transfer.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        own_host = self._name if apart else None
        meeting = {"host": host, "port": port, "own_host": own_host, "timeout_s": timeout_s}
        info = meeting | {"engine": self._spec.index, "spec": spec.as_dict()}
        try:
            await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))
        except Exception as error:
            raise EngineError(f"{self._name} could not connect to the trainer: {one_line(error)}") from error

    async def receive_weights(self, version: int, verify: bool) -> None:
        """Replace all weights by those that the training ranks send as `version`; `verify` must be the same on both sides.

        Running requests are halted and go on under the new weights, with their caches recomputed. On failure the engine stays halted and
        refuses to generate, because part of its weights may be new. Raises EngineError then.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._refuse_if_unfit()
        await self._hold("weights", clear_cache=True)
        try:
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"version": version, "verify": verify}))
            await self._llm.finish_weight_update(str(version))
            # Keys and values of the old weights must not serve a prompt under the new ones.
            if not await self._llm.reset_prefix_cache():
                raise EngineError("the prefix cache could not be emptied")
        except Exception as error:
            self._spoiled = f"{self._name} holds a mixture of weights since its update to version {version} failed: {one_line(error)}"
            raise EngineError(self._spoiled) from error
        self._version = version
        await self._release("weights")

    async def stored_digests(self) -> list[list[tuple[str, "Box", str]]]:
        """Return, for each worker, (tensor, box, SHA-256) of the weights in its memory that can be read (`EngineSpec.readable`)."""
        return await self._llm.collective_rpc("stored_digests")

    async def received_digests(self) -> list[list[tuple[str, "Box", str]]]:
        """Return, for each worker, (tensor, box, SHA-256) of the boxes of the last version; empty unless it was verified."""
        return await self._llm.collective_rpc("received_digests")

    async def version(self) -> int:
        """Return the version of the weights in use, as vLLM reports it."""
        return _version_number(await self._llm.get_weight_version())

    async def health(self) -> dict[str, Any]:
        """Return version, number of unfinished requests and what holds the engine. Raises EngineError when it is dead or spoiled."""
        self._refuse_if_unfit()
        return {
            "version": await self.version(),
            "unfinished": self._llm.get_num_unfinished_requests(),
            "held_by": sorted(self._holds),
        }

    async def shutdown(self) -> None:
        """End vLLM. The pool ends the actor itself, and what is left of its processes."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown, _SHUTDOWN_GRACE_S)
            self._llm = None

    async def _submit(self, request: Request) -> "RequestOutputCollector":
        """Send a request to the engine core; return the collector of its output.

        Messages to the engine core keep their order: a request submitted before a resume takes part in the first step after it.
        """
        self._refuse_if_unfit()
        if not request.prompt_ids or request.max_tokens < 1 or len(request.prompt_ids) + request.max_tokens > self._spec.max_model_len:
            raise ValueError(
                f"request {request.id}: {len(request.prompt_ids)} prompt tokens and up to {request.max_tokens} response tokens; both must "
                f"be at least 1 and together at most {self._spec.max_model_len}"
            )
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            max_tokens=request.max_tokens,
            stop_token_ids=list(self._spec.stop_token_ids),
            logprobs=0,  # the sampled token's alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async with self._death_explained():
            return await self._llm.add_request(request.id, tokens_input(list(request.prompt_ids)), params)

    async def _collect(self, request: Request, collector: "RequestOutputCollector") -> Generation:
        """Return the output of a submitted request; cancelling this call aborts the request in the engine."""
        try:
            async with self._death_explained():
                output = await collector.get()
                while not output.finished:
                    output = await collector.get()
        except asyncio.CancelledError:
            await self._llm.abort(collector.request_id, internal=True)
            raise
        finally:
            collector.close()
        return self._generation(request, cast("RequestOutput", output).outputs[0])  # a response, no embedding

    def _generation(self, request: Request, output: Any) -> Generation:
        """Convert vLLM's CompletionOutput to a Generation, and check it."""
        if output.finish_reason not in ("stop", "length"):
            raise EngineError(f"{self._name} ended request {request.id} with reason {output.finish_reason!r}")
        token_ids = list(output.token_ids)
        if len(output.logprobs) != len(token_ids):
            raise EngineError(f"{self._name} returned {len(output.logprobs)} logprobs for {len(token_ids)} tokens of request {request.id}")
        logprobs = [at_position[token].logprob for at_position, token in zip(output.logprobs, token_ids, strict=True)]
        for position, value in enumerate(logprobs):
            if not math.isfinite(value):
                raise EngineError(
                    f"{self._name}: logprob {value} at response token {position} of request {request.id}, under weights of version "
                    f"{self._version}; the model's output is not finite there"
                )
        if output.weight_versions is None:
            raise EngineError(f"{self._name} did not say which weights produced request {request.id}")
        return Generation(
            token_ids=np.array(token_ids, dtype=np.int32),
            logprobs=np.array(logprobs, dtype=np.float32),
            versions=tuple(VersionSpan(_version_number(span.version), span.start, span.end) for span in output.weight_versions),
            finish_reason=output.finish_reason,
        )

    async def _hold(self, reason: str, clear_cache: bool) -> None:
        """Halt decoding for `reason`. Several reasons may hold the engine at a time; it resumes when the last is released."""
        async with self._holding, self._death_explained():
            self._holds.add(reason)
            await self._llm.pause_generation(mode="keep", clear_cache=clear_cache)

    async def _release(self, reason: str) -> None:
        async with self._holding, self._death_explained():
            self._holds.discard(reason)
            if not self._holds:
                await self._llm.resume_generation()

    def _refuse_if_unfit(self) -> None:
        if self._llm is None:
            raise EngineError(f"{self._name} is not running")
        if self._llm.errored:
            raise EngineError(self._death())
        if self._spoiled:
            raise EngineError(self._spoiled)

    @contextlib.asynccontextmanager
    async def _death_explained(self) -> AsyncIterator[None]:
        """Raise EngineError with what is known, in place of vLLM's exception for a dead engine core."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            await asyncio.sleep(_OUTPUT_LAG_S)
            raise EngineError(self._death()) from error

    def _death(self) -> str:
        """Return what is known about why the engine died."""
        last = self._tail.cause() if self._tail else None
        return f"{self._name} died: " + (
            f"the last error that it printed is {last!r}"
            if last
            else "its engine core ended without a word; it was killed or out of memory"
        )

    async def _exit_with_engine_core(self) -> None:
        """End the actor when its engine core has died: it could answer nothing, but Ray would consider it alive."""
        while not self._llm.errored:
            await asyncio.sleep(_LIVENESS_PERIOD_S)
        print(self._death(), flush=True)
        await asyncio.sleep(_REPLY_GRACE_S)
        os._exit(1)


def _engine_core_start(device: str) -> contextlib.AbstractContextManager[None]:
    """Return the context in which vLLM starts its engine core.

    On a CPU the core is forked, so this process must not have computed with OpenMP threads: the core would wait for them forever.
    """
    if not FORKS_ENGINE_CORE[device]:
        return contextlib.nullcontext()
    from megatron_aspo.rollout.vllm_adapter import forked_engine_core

    return forked_engine_core()


async def _numbered(position: int, response: Awaitable[Generation]) -> tuple[int, Generation]:
    return position, await response


def _version_number(label: str) -> int:
    return INITIAL_VERSION if label == _VLLM_INITIAL_VERSION else int(label)
