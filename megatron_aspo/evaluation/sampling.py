"""Generates and grades responses part by part, for `megatron-aspo eval` and for evaluations during training.

A part is a fixed range of problems with all their responses. Deterministic evaluations generate one part after the other, so that what an
engine computes in one batch depends on the part alone: an evaluation that was killed and resumed gives the same tokens. Others keep the
engines full with all parts at once.
"""

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, cast

from megatron_aspo.data.records import Prompt
from megatron_aspo.evaluation.records import EvalResponse
from megatron_aspo.rollout.collector import request_seed
from megatron_aspo.rollout.engine import Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_aspo.rewards.pool import RewardPool
    from megatron_aspo.rewards.result import RewardResult
    from megatron_aspo.rollout.pool import EnginePool


@dataclass(frozen=True)
class Sampling:
    samples: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    stop: tuple[str, ...] = ()
    """A response ends before the first of these strings."""


@dataclass
class Part:
    """The problems at positions [start, stop), with their responses once generated."""

    number: int
    start: int
    stop: int
    responses: list[EvalResponse] = field(default_factory=list)
    """Problem by problem, sample by sample; empty before all are generated, and again once the part is finished."""


@dataclass(frozen=True)
class Reply:
    """A responder's reply to one request."""

    text: str
    token_ids: list[int] | None
    """None if an endpoint reports none."""
    tokens: int
    finish_reason: str


class Responder(Protocol):
    """Source of responses: engines or an endpoint."""

    def respond(self, requests: Sequence[Request], samples: int, on_reply: Callable[[int, Reply], None]) -> None:
        """Call on_reply, in this thread, with the position of each request and its reply as soon as it arrives.

        Every `samples` consecutive requests share a prompt.
        """
        ...


class EngineResponder:
    """Responses from an engine pool."""

    def __init__(self, engines: "EnginePool", tokenizer: "PreTrainedTokenizerBase"):
        self._engines, self._tokenizer = engines, tokenizer

    def respond(self, requests: Sequence[Request], samples: int, on_reply: Callable[[int, Reply], None]) -> None:
        with contextlib.closing(self._engines.stream(requests, samples)) as responses:
            for position, generation in responses:
                ids = generation.token_ids.tolist()
                text = cast(str, self._tokenizer.decode(generation.token_ids, skip_special_tokens=True))
                on_reply(position, Reply(text, ids, len(ids), generation.finish_reason))


def parts_of(problems: int, part_problems: int) -> list[Part]:
    """Split positions [0, problems) into parts of at most `part_problems`."""
    starts = range(0, problems, part_problems)
    return [Part(number, start, min(start + part_problems, problems)) for number, start in enumerate(starts)]


class Evaluator:
    """Generates and grades the responses of parts."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        responder: Responder | None,
        rewards: "RewardPool | None",
        on_part: Callable[[Part], None],
        phase: Callable[[str], None] = lambda phase: None,
    ):
        """Store what generates and grades.

        responder: None to grade only; rewards: None to generate only. on_part: called in `run`'s thread when all responses of a part are
        generated, and again when all are graded; then the part drops them. phase: called with "generating" and "scoring" as each begins.
        """
        self._prompts, self._sampling, self._responder, self._rewards = prompts, sampling, responder, rewards
        self._on_part, self._phase = on_part, phase
        self._pending: dict[int, tuple[Part, list[Future[RewardResult]]]] = {}

    def run(self, parts: Sequence[Part], one_by_one: bool) -> None:
        """Generate the responses of the parts that have none, and grade those of all parts.

        Propagates errors of generating and grading; no further response is graded then.
        """
        missing = [part for part in parts if not part.responses]
        try:
            for part in parts:
                for offset, response in enumerate(part.responses):
                    self._submit(part, offset, response)
            if self._responder and missing:
                self._phase("generating")
                for batch in ([part] for part in missing) if one_by_one else (missing,):
                    self._generate(batch, self._responder)
            if self._rewards:
                self._phase("scoring")
                self._finish_graded(wait=True)
        except BaseException:
            for future in (future for _, futures in self._pending.values() for future in futures):
                future.cancel()
            raise

    def _generate(self, batch: Sequence[Part], responder: Responder) -> None:
        samples = self._sampling.samples
        requests = [request for part in batch for request in self.requests(part)]
        owners = [part for part in batch for _ in range((part.stop - part.start) * samples)]
        first = {part.number: owners.index(part) for part in batch}
        replies: dict[int, dict[int, EvalResponse]] = {part.number: {} for part in batch}

        def receive(position: int, reply: Reply) -> None:
            part, offset = owners[position], position - first[owners[position].number]
            response = self._response(part.start + offset // samples, offset % samples, requests[position], reply)
            replies[part.number][offset] = response
            self._submit(part, offset, response)
            if len(replies[part.number]) == (part.stop - part.start) * samples:
                part.responses = [response for _, response in sorted(replies.pop(part.number).items())]
                self._on_part(part)
                if not self._rewards:
                    part.responses = []
            self._finish_graded(wait=False)

        responder.respond(requests, samples, receive)

    def requests(self, part: Part) -> list[Request]:
        """Return the part's requests. Seeds depend only on problem, sample and `seed`, so evaluations can be compared draw by draw."""
        sampling = self._sampling
        return [
            Request(
                id=f"evaluation, prompt {position} ({prompt.id}), response {index}",
                prompt_ids=prompt.token_ids,
                seed=request_seed(sampling.seed, "evaluation", position, prompt.id, index),
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
            )
            for position, prompt in enumerate(self._prompts[part.start : part.stop], part.start)
            for index in range(sampling.samples)
        ]

    def _response(self, position: int, index: int, request: Request, reply: Reply) -> EvalResponse:
        prompt = self._prompts[position]
        text = _truncate_at_stop(reply.text, self._sampling.stop)
        return EvalResponse(
            position=position,
            index=index,
            problem=prompt.id,
            data_source=prompt.data_source,
            prompt=prompt.text,
            prompt_ids=None if reply.token_ids is None else list(request.prompt_ids),
            seed=request.seed,
            response=text,
            response_ids=reply.token_ids,
            tokens=reply.tokens,
            finish_reason="stop" if len(text) < len(reply.text) else reply.finish_reason,
        )

    def _submit(self, part: Part, offset: int, response: EvalResponse) -> None:
        if self._rewards:
            _, futures = self._pending.setdefault(part.number, (part, []))
            futures += [Future() for _ in range(offset + 1 - len(futures))]  # earlier ones have not been generated yet
            futures[offset] = self._rewards.submit(self._prompts[response.position], response.response)

    def _finish_graded(self, wait: bool) -> None:
        """Pass on the parts that are completely graded. wait: wait for all parts."""
        for part, futures in list(self._pending.values()):
            if part.responses and (wait or all(future.done() for future in futures)):
                part.responses = [response.with_result(future.result()) for response, future in zip(part.responses, futures, strict=True)]
                del self._pending[part.number]
                self._on_part(part)
                part.responses = []


def _truncate_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    return text[: min((found for string in stop if (found := text.find(string)) >= 0), default=len(text))]
