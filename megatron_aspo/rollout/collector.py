"""From prompts to scored groups: what the loop asks of the engines and the reward workers."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_aspo.data.records import Generation, Group, Prompt, Sample
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.shaping import is_trained_on, overlong_penalty
from megatron_aspo.rollout.engine import Request
from megatron_aspo.rollout.options import RolloutOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_aspo.data.tasks import Task
    from megatron_aspo.rewards.worker import RewardPool
    from megatron_aspo.rollout.pool import EnginePool


def request_seed(*parts: object) -> int:
    """A seed in [0, 2**31) that depends on nothing but the parts: the same request draws the same tokens in every run."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@dataclass
class Collected:
    """Scored groups and how long their parts took."""

    groups: list[Group]
    """Everything that was generated."""
    kept: list[Group]
    """What is trained on."""
    resampled: int = 0
    """Groups generated in place of others."""
    missing: int = 0
    """Groups still wanted when the bound on extra generations was reached."""
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    """Response tokens generated."""


class Rollouts:
    """Draws prompts of the task, has the engines respond and the reward workers score.

    drawn: how many training prompts were taken so far; a resumed run goes on from there.
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
        drawn: int = 0,
    ):
        self._task, self._engines, self._rewards, self._tokenizer = task, engines, rewards, tokenizer
        self._options, self._algorithm, self._seed = options, algorithm, seed
        self.drawn = drawn

    def collect(self, step: int) -> Collected:
        """G scored responses to each of the next prompts_per_step prompts, and which groups the filter keeps.

        With `resample` another prompt is drawn for each group that it does not, in at most resample_rounds further generations.
        """
        wanted = self._options.prompts_per_step
        collected = self._collect(wanted, f"step {step}")
        if self._algorithm.group_filter != "resample":
            return collected
        for extra in range(1, self._algorithm.resample_rounds + 1):
            missing = wanted - len(collected.kept)
            if not missing:
                break
            more = self._collect(missing, f"step {step}, extra {extra}")
            collected = Collected(
                groups=collected.groups + more.groups,
                kept=collected.kept + more.kept,
                resampled=collected.resampled + missing,
                seconds={phase: value + more.seconds[phase] for phase, value in collected.seconds.items()},
                tokens=collected.tokens + more.tokens,
            )
        collected.missing = wanted - len(collected.kept)
        return collected

    def _collect(self, count: int, purpose: str) -> Collected:
        prompts = [self._task.prompt(self.drawn + i) for i in range(count)]
        self.drawn += count
        collected = self._respond(prompts, self._options.responses_per_prompt, self._options.temperature, purpose)
        collected.kept = [group for group in collected.groups if is_trained_on(group.shaped_rewards, self._algorithm.group_filter)]
        return collected

    def evaluate(self, draws: int, temperature: float) -> Collected:
        """`draws` scored responses to each held-out prompt. The seeds never change, so that two evaluations can be compared."""
        return self._respond(self._task.held_out(), draws, temperature, "evaluation")

    def _respond(self, prompts: Sequence[Prompt], responses: int, temperature: float, purpose: str) -> Collected:
        requests = [
            Request(
                id=f"{purpose}, prompt {position} ({prompt.id}), response {i}",
                prompt_ids=prompt.token_ids,
                # The position tells apart two draws of the same prompt in one step.
                seed=request_seed(self._seed, purpose, position, prompt.id, i),
                max_tokens=self._options.max_response_tokens,
                temperature=temperature,
            )
            for position, prompt in enumerate(prompts)
            for i in range(responses)
        ]
        start = time.perf_counter()
        generations = self._engines.generate(requests, group_size=responses)
        generated = time.perf_counter()
        texts = self._tokenizer.batch_decode([g.token_ids for g in generations], skip_special_tokens=True)
        owners = [prompt for prompt in prompts for _ in range(responses)]
        results = self._rewards.score(list(zip(owners, texts, strict=True)))
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
            )
            for i, (owner, request, generation, text, result) in enumerate(zip(owners, requests, generations, texts, results, strict=True))
        ]
        groups = [Group(prompt, tuple(samples[n * responses : (n + 1) * responses])) for n, prompt in enumerate(prompts)]
        seconds = {"generate": generated - start, "reward": time.perf_counter() - generated}
        return Collected(groups, groups, seconds=seconds, tokens=_total_tokens(generations))


def _total_tokens(generations: Sequence[Generation]) -> int:
    return sum(len(generation.token_ids) for generation in generations)
