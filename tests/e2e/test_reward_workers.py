"""Rewards in processes of their own."""

import os

import pytest

from megatron_aspo.data.options import DataOptions
from megatron_aspo.data.records import Prompt
from megatron_aspo.errors import UserError
from megatron_aspo.rewards.worker import RewardPool

MODULE = "tests.unit.user_rewards"


def make_prompt(truth=7, number=1):
    return Prompt(f"train/{number}", (1, 2), "the words", truth, "jsonl")


def pool(reward, workers=1):
    return RewardPool("jsonl", DataOptions(reward=f"{MODULE}:{reward}"), workers)


def test_a_batch_is_spread_over_worker_processes_and_comes_back_in_order(ray_cluster):
    with pool("details", workers=2) as rewards, pool("process", workers=2) as processes:
        batch = [(make_prompt(number=i), f"response {i}") for i in range(5)]
        assert [result.details["seen"][1] for result in rewards.score(batch)] == [f"response {i}" for i in range(5)]
        assert rewards.score([]) == []
        assert len(rewards.score(batch[:1])) == 1
        pids = [result.details["pid"] for result in processes.score(batch)]
        assert os.getpid() not in pids
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 2]


def test_the_reward_of_a_procedural_task_runs_in_a_worker(ray_cluster):
    with RewardPool("single_digit_addition", DataOptions()) as rewards:
        assert [result.score for result in rewards.score([(make_prompt(7), "7"), (make_prompt(7), "9")])] == [1.0, 0.0]


def test_faults_in_a_worker_are_user_errors(ray_cluster):
    with pytest.raises(UserError, match="has no missing"):
        pool("missing")
    with pool("raising") as rewards, pytest.raises(UserError, match="on prompt train/1 raised KeyError"):
        rewards.score([(make_prompt(), "")])
    with pool("leaving") as rewards, pytest.raises(UserError, match="user_rewards:leaving ended its worker process"):
        rewards.score([(make_prompt(), "")])
