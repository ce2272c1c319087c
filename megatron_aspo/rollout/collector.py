"""From prompts to scored groups: the loop's use of engines and reward workers."""

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.records import Generation, Group, Prompt, Sample
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.shaping import is_trained_on, overlong_penalty
from megatron_aspo.rollout.engine import Request
from megatron_aspo.rollout.options import RolloutOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_aspo.rewards.pool import RewardPool
    from megatron_aspo.rewards.result import RewardResult
    from megatron_aspo.rollout.pool import EnginePool
    from megatron_aspo.tasks.task import Task

_MAX_NAMED = 3
"""Failed rewards and lost reward workers that are reported one by one; the others are counted."""


def request_seed(*parts: object) -> int:
    """Return a seed in [0, 2**31), a pure function of the parts: the same request draws the same tokens in every run."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@dataclass
class Collected:
    """Scored groups and the seconds that they took."""

    first: int
    """Position of the first group's prompt among all training prompts of the run."""
    groups: list[Group]
    """All groups that were generated."""
    kept: list[Group]
    """The groups that are trained on."""
    resampled: int = 0
    """Groups generated to replace others."""
    missing: int = 0
    """Groups still missing after the last extra generation."""
    seconds: dict[str, float] = field(default_factory=dict)
    """`generate`: until the last response. `reward`: from then until the last score."""
    tokens: int = 0
    """Response tokens generated."""
    worker_restarts: int = 0
    """Reward workers that were lost and replaced."""

    def prompts(self) -> dict[str, int]:
        """Return which of the run's training prompts the groups answer, as the ledger records it."""
        return {"first": self.first, "count": len(self.groups)}

    def used(self) -> list[int]:
        """Return the positions, among the run's training prompts, of those whose groups are trained on."""
        return [self.first + position for position, group in enumerate(self.groups) if any(group is kept for kept in self.kept)]


class Rollouts:
    """Draws prompts from the task, lets engines respond, and reward workers score each response as soon as it is finished.

    log: prints a line, such as a response on which the reward fails. drawn: number of training prompts taken so far, from which a resumed
    run goes on.
    """

    def __init__(
        self,
        task: "Task",
        engines: "EnginePool",
        rewards: "RewardPool",
        tokenizer: "PreTrainedTokenizerBase",
        options: RolloutOptions,
        algorithm: AlgorithmOptions,
        seed: int,
        log: Callable[[str], None],
        drawn: int = 0,
    ):
        self._task, self._engines, self._rewards, self._tokenizer = task, engines, rewards, tokenizer
        self._options, self._algorithm, self._seed, self._log = options, algorithm, seed, log
        self.drawn = drawn

    def collect(self, step: int, phase: Callable[[str], None]) -> Collected:
        """Return G scored responses to each of the next prompts_per_step prompts, and the groups that the filter keeps.

        With `resample` another prompt is drawn for each group that is filtered out, in at most resample_rounds further generations. `phase`
        is called with "generating" and "scoring" when either begins. Raises UserError if the reward failed on every response.
        """
        collected = self._collect_kept(step, phase)
        self._require_scores(collected.groups)
        return collected

    def _collect_kept(self, step: int, phase: Callable[[str], None]) -> Collected:
        wanted = self._options.prompts_per_step
        collected = self._collect(wanted, f"step {step}", phase)
        if self._algorithm.group_filter != "resample":
            return collected
        for extra in range(1, self._algorithm.resample_rounds + 1):
            missing = wanted - len(collected.kept)
            if not missing:
                break
            more = self._collect(missing, f"step {step}, extra {extra}", phase)
            collected = Collected(
                first=collected.first,
                groups=collected.groups + more.groups,
                kept=collected.kept + more.kept,
                resampled=collected.resampled + missing,
                seconds={phase: value + more.seconds[phase] for phase, value in collected.seconds.items()},
                tokens=collected.tokens + more.tokens,
                worker_restarts=collected.worker_restarts + more.worker_restarts,
            )
        collected.missing = wanted - len(collected.kept)
        return collected

    def _collect(self, count: int, purpose: str, phase: Callable[[str], None]) -> Collected:
        first = self.drawn
        prompts = [self._task.prompt(first + i) for i in range(count)]
        self.drawn += count
        collected = self._respond(first, prompts, self._options.responses_per_prompt, self._options.temperature, purpose, phase)
        collected.kept = [group for group in collected.groups if is_trained_on(group.shaped_rewards, self._algorithm.group_filter)]
        return collected

    def _respond(
        self, first: int, prompts: Sequence[Prompt], responses: int, temperature: float, purpose: str, phase: Callable[[str], None]
    ) -> Collected:
        requests = [
            Request(
                id=f"{purpose}, prompt {position} ({prompt.id}), response {i}",
                prompt_ids=prompt.token_ids,
                # The position distinguishes two draws of the same prompt in one step.
                seed=request_seed(self._seed, purpose, position, prompt.id, i),
                max_tokens=self._options.max_response_tokens,
                temperature=temperature,
            )
            for position, prompt in enumerate(prompts)
            for i in range(responses)
        ]
        owners = [prompt for prompt in prompts for _ in range(responses)]
        generations, texts, results, seconds = self._generate_and_score(requests, owners, responses, phase)
        samples = [
            Sample(
                prompt=owner,
                index=i % responses,
                seed=request.seed,
                generation=generation,
                text=text,
                reward=result.score,
                shaped_reward=result.score
                + overlong_penalty(len(generation.token_ids), self._options.max_response_tokens, self._algorithm),
                reward_details={"reason": result.reason, **result.details},
                failure=result.failure,
            )
            for i, (owner, request, generation, text, result) in enumerate(zip(owners, requests, generations, texts, results, strict=True))
        ]
        groups = [Group(prompt, tuple(samples[n * responses : (n + 1) * responses])) for n, prompt in enumerate(prompts)]
        return Collected(
            first,
            groups,
            groups,
            seconds=seconds,
            tokens=_total_tokens(generations),
            worker_restarts=self._report_losses(),
        )

    def _generate_and_score(
        self, requests: Sequence[Request], owners: Sequence[Prompt], responses: int, phase: Callable[[str], None]
    ) -> tuple[list[Generation], list[str], list["RewardResult"], dict[str, float]]:
        """Return the response, its text and its result for each request, and the seconds of `Collected`.

        Each response is scored while others are generated. If either fails, scoring that has not begun is cancelled.
        """
        texts = [""] * len(requests)
        scores: dict[int, Future[RewardResult]] = {}

        def score(position: int, generation: Generation) -> None:
            texts[position] = cast(str, self._tokenizer.decode(generation.token_ids, skip_special_tokens=True))
            scores[position] = self._rewards.submit(owners[position], texts[position])

        phase("generating")
        start = time.perf_counter()
        try:
            generations = self._engines.generate(requests, responses, score)
            generated = time.perf_counter()
            phase("scoring")
            results = self._results([scores[position] for position in range(len(requests))], owners, responses)
        except BaseException:
            for future in scores.values():
                future.cancel()
            raise
        return generations, texts, results, {"generate": generated - start, "reward": time.perf_counter() - generated}

    def _results(self, scores: Sequence["Future[RewardResult]"], owners: Sequence[Prompt], responses: int) -> list["RewardResult"]:
        """Wait for all scores, `responses` for each owner; report those on which the reward failed."""
        failed: list[int] = []
        results = []
        for position, future in enumerate(scores):
            results.append(result := future.result())
            if result.failure:
                failed.append(position)
                if len(failed) <= _MAX_NAMED:
                    where = f"prompt {owners[position].id}, response {position % responses}"
                    self._log(f"{where}: {self._rewards.name} {result.reason}; its reward is {result.score:g} (data.reward_failure_score)")
        if len(failed) > _MAX_NAMED:
            score = results[failed[0]].score
            self._log(f"{self._rewards.name} failed on {len(failed)} of {len(results)} responses; their reward is {score:g}")
        return results

    def _report_losses(self) -> int:
        """Report the reward workers that were lost and replaced; return their number."""
        losses = self._rewards.take_losses()
        for line in losses[:_MAX_NAMED]:
            self._log(line)
        if len(losses) > _MAX_NAMED:
            self._log(f"{len(losses)} reward workers were lost and replaced")
        return len(losses)

    def _require_scores(self, groups: Sequence[Group]) -> None:
        """Raise UserError if the reward failed on every response."""
        samples = [sample for group in groups for sample in group.samples]
        if samples and all(sample.failure for sample in samples):
            raise UserError(
                f"{self._rewards.name} failed on all of {len(samples)} responses: on the last it {samples[-1].reward_details['reason']}; "
                "correct it, or raise data.reward_timeout_s"
            )


def _total_tokens(generations: Sequence[Generation]) -> int:
    return sum(len(generation.token_ids) for generation in generations)
