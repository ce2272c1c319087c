"""Rewards on the cluster, in processes of their own."""

import json
import os
import threading
import time

import psutil
import pytest

from megatron_aspo.data.options import DataOptions
from megatron_aspo.data.records import Prompt
from megatron_aspo.errors import UserError
from megatron_aspo.rewards import worker
from megatron_aspo.rewards.code.options import CodeOptions
from megatron_aspo.rewards.sandbox.options import Limits
from megatron_aspo.rewards.worker import RewardPool
from tests.unit.test_reward_process import BACKTRACKING, alive

MODULE = "tests.unit.user_rewards"


def make_prompt(truth=7, number=1):
    return Prompt(f"train/{number}", (1, 2), "the words", truth, "jsonl")


def pool(reward, workers=1, timeout_s=60.0):
    return RewardPool("jsonl", DataOptions(reward=f"{MODULE}:{reward}", reward_timeout_s=timeout_s), workers)


def batch_of(*responses):
    return [(make_prompt(number=i), response) for i, response in enumerate(responses)]


def test_a_batch_is_spread_over_worker_processes_and_comes_back_in_order(ray_cluster):
    with pool("details", workers=2) as rewards, pool("process", workers=2) as processes:
        batch = [(make_prompt(number=i), f"response {i}") for i in range(5)]
        assert [result.details["seen"][1] for result in rewards.score(batch)] == [f"response {i}" for i in range(5)]
        assert rewards.score([]) == []
        assert len(rewards.score(batch[:1])) == 1
        pids = [result.details["pid"] for result in processes.score(batch)]
        assert os.getpid() not in pids
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 2]
    assert not any(map(psutil.pid_exists, pids))


def test_the_reward_of_a_procedural_task_runs_in_a_worker(ray_cluster):
    with RewardPool("single_digit_addition", DataOptions()) as rewards:
        assert [result.score for result in rewards.score([(make_prompt(7), "7"), (make_prompt(7), "9")])] == [1.0, 0.0]


def test_faults_in_a_worker_are_user_errors(ray_cluster):
    with pytest.raises(UserError, match="has no missing"):
        pool("missing")
    with pool("raising") as rewards, pytest.raises(UserError, match="on prompt train/1 raised KeyError"):
        rewards.score([(make_prompt(), "")])


def test_one_worker_goes_on_while_the_reward_hangs_or_crashes_in_the_other(ray_cluster):
    failed = {}
    with pool("does", workers=2, timeout_s=1.5) as rewards:
        batch = batch_of("1", BACKTRACKING, "333", "os._exit(3)", "55555", "666666", "7777777", "88888888", "999999999", "1234567890")
        results = rewards.score(batch, failed.__setitem__)
    assert [result.score for result in results] == [1, 0, 3, 0, 5, 6, 7, 8, 9, 10]
    assert {position: (result.reason, result.failure) for position, result in failed.items()} == {
        1: ("timed out after 1.5 s", "timeout"),
        3: ("ended its process (exit status 3) twice", "crash"),
    }
    assert max(result.details["time"] for result in results[5:]) < results[2].details["time"] - 1.0


def test_a_reward_that_always_hangs_ends_the_run_after_a_bounded_number_of_responses(ray_cluster, monkeypatch):
    monkeypatch.setattr(worker, "_MAX_FAILURES_IN_A_ROW", 3)
    hang = "time.sleep(99)"
    with pool("does", timeout_s=0.6) as rewards:
        # A score in between: not broken.
        assert [r.failure for r in rewards.score(batch_of(hang, hang, "3", hang, hang))] == ["timeout", "timeout", "", "timeout", "timeout"]
        message = r"user_rewards:does failed on 3 responses in a row: on the last it timed out after 0\.6 s; correct it, or raise data\.rew"
        with pytest.raises(UserError, match=message):
            rewards.score(batch_of(*[hang] * 1000))


def test_closing_ends_a_worker_that_hangs_and_all_that_it_started(ray_cluster):
    marker = f"{97.5 + time.monotonic() % 1}"
    rewards = pool("does", workers=2)
    batch = batch_of(*[f"subprocess.Popen(['sleep', '{marker}'], start_new_session=True); {BACKTRACKING}"] * 2)
    ended = []

    def score():
        try:
            rewards.score(batch)
        except UserError as error:
            ended.append(error)

    thread = threading.Thread(target=score)
    thread.start()
    deadline = time.monotonic() + 20
    while len(alive(marker)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    children = alive("megatron_aspo.rewards.child")
    assert len(alive(marker)) == 2 and len(children) >= 2
    rewards.close()
    thread.join(timeout=20)
    assert ended and not alive(marker)


def test_a_worker_that_is_killed_takes_its_child_process_with_it(ray_cluster):
    with pool("does") as rewards:
        (result,) = rewards.score(batch_of("1"))
        child = psutil.Process(result.details["pid"])
        os.kill(child.ppid(), 9)
        assert not psutil.wait_procs([child], timeout=10)[1]
        with pytest.raises(UserError, match=r"a worker process of data\.reward=.*does was killed, or its machine was lost"):
            rewards.score(batch_of("1"))


@pytest.mark.usefixtures("ray_cluster")
def test_programs_are_graded_in_the_workers_sandboxes():
    truth = json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]})
    programs = {
        "print(sum(map(int, input().split())))": 1.0,
        "print(3)": 0.0,
        "import os; os.kill(os.getppid(), 9)": 0.0,
        "while True: pass": 0.0,
    }
    options = DataOptions(reward="code", code=CodeOptions(limits=Limits(cpu_s=1.0, wall_s=3.0)))
    with RewardPool("jsonl", options, workers=2) as rewards:
        before = set(psutil.pids())
        results = rewards.score([(make_prompt(truth), f"```python\n{code}\n```") for code in [*programs] * 2])
        assert [result.score for result in results] == [*programs.values()] * 2
        assert not any(result.failure for result in results)
        assert {result.details["verdict"] for result in results[:4]} >= {"passed", "wrong answer"}
    deadline = time.monotonic() + 10
    while left := [pid for pid in set(psutil.pids()) - before if "bwrap" in _name(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.NoSuchProcess:
        return ""
