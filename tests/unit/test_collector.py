"""Which phase is shown while groups are collected, and which responses are named when the reward fails on them."""

import numpy as np
import pytest

from megatron_aspo.data.records import Generation, Prompt, VersionSpan
from megatron_aspo.errors import UserError
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.observe.health import rollout_health
from megatron_aspo.rewards.result import RewardResult
from megatron_aspo.rollout.collector import Rollouts
from megatron_aspo.rollout.options import RolloutOptions

RESPONSES = 4


class Stub:
    """Engines, rewards, task and tokenizer in one.

    `failures` names the positions of a batch on which the reward fails, and how; `size` is how many training prompts there are.
    """

    name = "data.reward=m:f"

    def __init__(self, failures=(), size=1000):
        self.failures, self.phases, self.lines = dict(failures), [], []
        self.calls, self.size, self.requests = [], size, []

    def prompt(self, index):
        return Prompt(f"train/{index % self.size}", (1,), "words", 0, "jsonl")

    def held_out(self):
        return [self.prompt(index) for index in (100, 101)]

    def generate(self, requests, group_size):
        self.calls.append(("generate", self.phases[-1]))
        self.requests += requests
        return [Generation(np.array([1], np.int32), np.zeros(1, np.float32), (VersionSpan(0, 0, 1),), "stop") for _ in requests]

    def batch_decode(self, ids, skip_special_tokens):
        return ["x"] * len(ids)

    def score(self, batch, on_failure):
        self.calls.append(("score", self.phases[-1]))
        results = []
        for position in range(len(batch)):
            failure = self.failures.get(position, "")
            reason = {"": "right", "timeout": "timed out after 60 s", "crash": "ended its process (exit status 1) twice"}[failure]
            results.append(RewardResult(-0.5 if failure else 1.0, reason, {"failed": True} if failure else {}, failure))
            if failure:
                on_failure(position, results[-1])
        return results

    def rollouts(self, seed=0, **algorithm):
        options = RolloutOptions(prompts_per_step=2, responses_per_prompt=RESPONSES)
        return Rollouts(self, self, self, self, options, AlgorithmOptions(**algorithm), seed, self.lines.append)


def test_the_phase_is_scoring_while_the_rewards_run():
    """Every group has equal rewards, so that other prompts are drawn for them: generation and scoring alternate."""
    stub = Stub()
    stub.rollouts(group_filter="resample", resample_rounds=2).collect(0, stub.phases.append)
    assert stub.calls == [("generate", "generating"), ("score", "scoring")] * 3
    stub.rollouts().evaluate(1, 1.0, stub.phases.append)
    assert stub.calls[-2:] == [("generate", "generating"), ("score", "scoring")] and not stub.lines


def test_a_failure_is_counted_named_and_in_the_details():
    stub = Stub({1: "timeout", 6: "crash"})
    groups = stub.rollouts(group_filter="none").collect(0, stub.phases.append).groups
    end = "its reward is -0.5 (data.reward_failure_score)"
    assert stub.lines == [
        f"prompt train/0, response 1: data.reward=m:f timed out after 60 s; {end}",
        f"prompt train/1, response 2: data.reward=m:f ended its process (exit status 1) twice; {end}",
    ]
    health = rollout_health(groups)
    assert (health["reward/timeouts"], health["reward/crashes"]) == (1, 1)
    assert groups[0].samples[1].reward_details == {"reason": "timed out after 60 s", "failed": True}
    assert groups[0].rewards.tolist() == [1.0, -0.5, 1.0, 1.0]


def test_the_first_failures_are_named_and_the_rest_counted():
    stub = Stub(dict.fromkeys(range(1, 8), "timeout"))
    stub.rollouts().evaluate(RESPONSES, 1.0, stub.phases.append)
    assert [line.split(":")[0] for line in stub.lines[:3]] == [f"prompt train/100, response {i}" for i in (1, 2, 3)]
    assert stub.lines[3:] == ["data.reward=m:f failed on 7 of 8 responses; their reward is -0.5"]


@pytest.mark.parametrize("collect", ["collect", "evaluate"])
def test_a_reward_that_fails_on_every_response_ends_the_run(collect):
    stub = Stub(dict.fromkeys(range(8), "timeout"))
    rollouts = stub.rollouts()
    with pytest.raises(UserError, match=r"data\.reward=m:f failed on all of 8 responses: on the last it timed out after 60 s; correct it"):
        rollouts.collect(0, stub.phases.append) if collect == "collect" else rollouts.evaluate(RESPONSES, 1.0, stub.phases.append)


def test_no_two_responses_of_a_run_share_a_seed_and_another_run_draws_the_same():
    """One prompt alone is drawn, twice a generation, in extra generations of a step too, and in an evaluation."""

    def seeds(seed: int) -> list[int]:
        stub = Stub(size=1)
        stub.held_out = lambda: [stub.prompt(0)]
        rollouts = stub.rollouts(seed, group_filter="resample", resample_rounds=1)
        for step in range(2):
            rollouts.collect(step, stub.phases.append)
        rollouts.evaluate(RESPONSES, 1.0, stub.phases.append)
        return [request.seed for request in stub.requests]

    ours = seeds(0)
    assert len(ours) == len(set(ours)) == (2 * 2 * 2 + 1) * RESPONSES
    assert seeds(0) == ours and not set(seeds(1)) & set(ours)


def test_evaluations_draw_with_the_same_seeds_whenever_they_are_made():
    stub = Stub()
    rollouts = stub.rollouts()
    rollouts.evaluate(RESPONSES, 1.0, stub.phases.append)
    before = [(request.prompt_ids, request.seed) for request in stub.requests]
    rollouts.collect(0, stub.phases.append)
    stub.requests.clear()
    rollouts.evaluate(RESPONSES, 1.0, stub.phases.append)
    assert [(request.prompt_ids, request.seed) for request in stub.requests] == before


def test_every_generation_goes_on_with_the_next_prompts():
    stub = Stub()
    rollouts = stub.rollouts(group_filter="resample", resample_rounds=1)
    for step in range(2):
        rollouts.collect(step, stub.phases.append)
    drawn = list(dict.fromkeys(request.id.partition("(")[2].partition(")")[0] for request in stub.requests))
    assert drawn == [f"train/{index}" for index in range(8)] and rollouts.drawn == 8
