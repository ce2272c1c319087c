"""How generation and scoring overlap, which phase is shown meanwhile, and which responses are named when the reward fails on them."""

from concurrent.futures import Future

import numpy as np
import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.records import Generation, Prompt, VersionSpan
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.observe.health import rollout_health
from megatron_aspo.rewards.result import RewardResult
from megatron_aspo.rollout.collector import Rollouts
from megatron_aspo.rollout.options import RolloutOptions

RESPONSES = 4


class Score(Future):
    """Refuses to be waited for while responses are still generated."""

    def __init__(self, stub):
        super().__init__()
        self.stub = stub

    def result(self, timeout=None):
        assert self.stub.phases[-1] == "scoring" and self.done()
        return super().result(timeout)


class Stub:
    """Engines, rewards, task and tokenizer in one.

    `failures` names the positions of a batch on which the reward fails, and how; `size` is how many training prompts there are. Responses
    finish in the order `order` of their positions, by default backwards; each is scored at once, or never with `unscored`. `losses` are
    what happened to reward workers.
    """

    name = "data.reward=m:f"

    def __init__(self, failures=(), size=1000, order=reversed, unscored=False, losses=()):
        self.failures, self.phases, self.lines = dict(failures), [], []
        self.size, self.order, self.unscored, self.losses = size, order, unscored, list(losses)
        self.calls, self.requests = [], []

    def prompt(self, index):
        return Prompt(f"train/{index % self.size}", (1,), "words", 0, "dataset")

    def generate(self, requests, group_size, on_response):
        assert group_size == RESPONSES
        self.requests += requests
        self.scores, self.handed_on = [], []
        one = np.zeros(1, np.float32)
        generations = [Generation(np.array([i], np.int32), one, (VersionSpan(0, 0, 1),), "stop") for i in range(len(requests))]
        for position in self.order(range(len(requests))):
            self.calls.append((position, self.phases[-1]))
            on_response(position, generations[position])
            self.handed_on.append(len(self.scores))
        return generations

    def decode(self, ids, skip_special_tokens):
        return f"response {ids[0]}"

    def submit(self, prompt, response):
        score, position = Score(self), int(response.split()[1])
        self.scores.append(score)
        if not self.unscored:
            failure = self.failures.get(position, "")
            reason = {"": response, "timeout": "timed out after 60 s", "crash": "ended its process (exit status 1) twice"}[failure]
            result = RewardResult(-0.5 if failure else 1.0, reason, {"failed": True} if failure else {"for": prompt.id}, failure)
            score.set_result(result)
        return score

    def take_losses(self):
        losses, self.losses = self.losses, []
        return losses

    def rollouts(self, seed=0, **algorithm):
        options = RolloutOptions(prompts_per_step=2, responses_per_prompt=RESPONSES)
        return Rollouts(self, self, self, self, options, AlgorithmOptions(**algorithm), seed, self.lines.append)


def test_every_response_is_handed_to_the_reward_while_others_are_generated():
    """Scores are waited for when generation is over: until then `Score` refuses it. The order of arrival changes nothing."""
    collected = []
    for order in (list, reversed, lambda positions: sorted(positions, key=lambda i: (i % 3, i))):
        stub = Stub(order=order)
        collected.append(stub.rollouts(group_filter="none").collect(0, stub.phases.append))
        assert stub.calls == [(position, "generating") for position in order(range(8))]
        assert stub.handed_on == [1, 2, 3, 4, 5, 6, 7, 8]
        assert stub.phases == ["generating", "scoring"]
    for one in collected:
        assert [group.prompt.id for group in one.groups] == ["train/0", "train/1"]
        samples = [sample for group in one.groups for sample in group.samples]
        assert [sample.text for sample in samples] == [f"response {i}" for i in range(8)]
        assert [sample.reward_details for sample in samples] == [{"reason": f"response {i}", "for": f"train/{i // 4}"} for i in range(8)]
        assert [int(sample.generation.token_ids[0]) for sample in samples] == list(range(8))
        assert one.tokens == 8 and set(one.seconds) == {"generate", "reward"} and one.worker_restarts == 0


def test_generation_and_scoring_alternate_when_prompts_are_drawn_again():
    """Every group has equal rewards, so that other prompts are drawn for them."""
    stub = Stub()
    stub.rollouts(group_filter="resample", resample_rounds=2).collect(0, stub.phases.append)
    assert stub.phases == ["generating", "scoring"] * 3
    assert not stub.lines


def test_what_waits_for_a_score_is_given_up_when_an_engine_fails():
    stub = Stub(unscored=True)

    def two_then_death(positions):
        yield from (0, 5)
        raise RuntimeError("engine 1 died")

    stub.order = two_then_death
    with pytest.raises(RuntimeError, match="engine 1 died"):
        stub.rollouts().collect(0, stub.phases.append)
    assert [score.cancelled() for score in stub.scores] == [True, True]


def test_lost_workers_are_counted_and_the_first_reported_one_by_one():
    stub = Stub(losses=["first", "second", "third", "fourth"])
    assert stub.rollouts().collect(0, stub.phases.append).worker_restarts == 4
    assert stub.lines == ["first", "second", "third", "4 reward workers were lost and replaced"]


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
    stub.rollouts(group_filter="none").collect(0, stub.phases.append)
    assert [line.split(":")[0] for line in stub.lines[:3]] == [f"prompt train/0, response {i}" for i in (1, 2, 3)]
    assert stub.lines[3:] == ["data.reward=m:f failed on 7 of 8 responses; their reward is -0.5"]


def test_a_reward_that_fails_on_every_response_ends_the_run():
    stub = Stub(dict.fromkeys(range(8), "timeout"))
    rollouts = stub.rollouts()
    with pytest.raises(UserError, match=r"data\.reward=m:f failed on all of 8 responses: on the last it timed out after 60 s; correct it"):
        rollouts.collect(0, stub.phases.append)


def test_no_two_responses_of_a_run_share_a_seed_and_another_run_draws_the_same():
    """One prompt alone is drawn, twice a generation, in extra generations of a step too."""

    def seeds(seed: int) -> list[int]:
        stub = Stub(size=1)
        rollouts = stub.rollouts(seed, group_filter="resample", resample_rounds=1)
        for step in range(2):
            rollouts.collect(step, stub.phases.append)
        return [request.seed for request in stub.requests]

    ours = seeds(0)
    assert len(ours) == len(set(ours)) == 2 * 2 * 2 * RESPONSES
    assert seeds(0) == ours and not set(seeds(1)) & set(ours)


def test_every_generation_goes_on_with_the_next_prompts():
    stub = Stub()
    rollouts = stub.rollouts(group_filter="resample", resample_rounds=1)
    for step in range(2):
        rollouts.collect(step, stub.phases.append)
    drawn = list(dict.fromkeys(request.id.partition("(")[2].partition(")")[0] for request in stub.requests))
    assert drawn == [f"train/{index}" for index in range(8)] and rollouts.drawn == 8
