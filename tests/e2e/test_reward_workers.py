"""Rewards on the cluster, in separate processes."""

import json
import os
import signal
import time

import psutil
import pytest
import ray

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards import pool as pool_module, remote
from megatron_aspo.rewards.code.options import CodeOptions
from megatron_aspo.rewards.pool import RewardPool
from megatron_aspo.rewards.sandbox.options import Limits
from megatron_aspo.tasks.options import DataOptions
from tests.unit.test_reward_process import BACKTRACKING, alive

pytestmark = pytest.mark.long

MODULE = "tests.unit.user_rewards"
DIED = "died (killed, out of memory, or its node was lost)"
RESOURCE = "node:127.0.0.1"
"""Ray gives each node 1 unit of a resource with this name."""


def make_prompt(truth=7, number=1):
    return Prompt(f"train/{number}", (1, 2), "the words", truth, "dataset")


def pool(reward, workers=1, timeout_s=60.0, resource=""):
    options = DataOptions(reward=f"{MODULE}:{reward}", reward_timeout_s=timeout_s, reward_failure_score=-2.5, reward_resource=resource)
    return RewardPool("dataset", options, workers)


def batch_of(*responses):
    return [(make_prompt(number=i), response) for i, response in enumerate(responses)]


def score(rewards, batch):
    return [future.result(120) for future in [rewards.submit(*pair) for pair in batch]]


def test_responses_are_scored_by_several_processes_at_once_and_none_is_the_driver(ray_cluster, tmp_path):
    """Each waits until the other has begun."""
    meet = "open('{0}/{1}', 'x').close()\nwhile not os.path.exists('{0}/{2}'): time.sleep(0.01)"
    with pool("does", workers=2, timeout_s=30) as rewards:
        results = score(rewards, batch_of(meet.format(tmp_path, "a", "b"), meet.format(tmp_path, "b", "a")))
        pids = {result.details["pid"] for result in results}
        assert len(pids) == 2 and os.getpid() not in pids
        assert not any(result.failure for result in results) and not rewards.take_losses()
    assert not any(map(psutil.pid_exists, pids))


def test_every_response_gets_its_own_result(ray_cluster):
    with pool("details", workers=2) as rewards:
        batch = [(make_prompt(number=i), f"response {i}") for i in range(5)]
        assert [result.details["seen"][1] for result in score(rewards, batch)] == [f"response {i}" for i in range(5)]


def test_the_reward_of_a_procedural_task_runs_in_a_worker(ray_cluster):
    with RewardPool("single_digit_addition", DataOptions()) as rewards:
        assert [result.score for result in score(rewards, [(make_prompt(7), "7"), (make_prompt(7), "9")])] == [1.0, 0.0]


def test_a_reward_that_cannot_be_loaded_is_a_user_error(ray_cluster):
    with pytest.raises(UserError, match="has no missing"), pool("missing"):
        pass


def test_a_reward_that_raises_cancels_the_remaining_responses(ray_cluster):
    """The hanging worker is not waited for, the responses queued behind it are not begun, and no more are accepted."""
    with pool("does", workers=2) as rewards:
        futures = [rewards.submit(*pair) for pair in batch_of("time.sleep(99)", "raise KeyError('two')", "22", "333")]
        for future in reversed(futures):
            with pytest.raises(UserError, match="on prompt train/1 raised KeyError"):
                future.result(30)
        with pytest.raises(UserError, match="on prompt train/1 raised KeyError"):
            rewards.submit(make_prompt(), "4444")


def test_a_cancelled_response_is_not_scored(ray_cluster, tmp_path):
    go, touched = tmp_path / "go", tmp_path / "touched"
    with pool("does") as rewards:
        first = rewards.submit(make_prompt(), f"while not os.path.exists('{go}'): time.sleep(0.01)")
        second = rewards.submit(make_prompt(), f"open('{touched}', 'x')")
        third = rewards.submit(make_prompt(), "333")
        assert second.cancel()
        go.touch()
        assert [first.result().failure, third.result().score] == ["", 3.0] and not touched.exists()


def test_one_worker_continues_while_the_reward_hangs_or_crashes_in_the_other(ray_cluster, tmp_path):
    """The response that hangs begins first, and is killed only when all others are done."""
    with pool("does", workers=2, timeout_s=4) as rewards:
        futures = [rewards.submit(*pair) for pair in batch_of(BACKTRACKING, "1", "os._exit(3)", "333", "4444")]
        results = [future.result() for future in futures[1:]]
        assert not futures[0].done()
        results.insert(0, futures[0].result())
    assert [result.score for result in results] == [-2.5, 1, -2.5, 3, 4]
    assert {position: (result.reason, result.failure) for position, result in enumerate(results) if result.failure} == {
        0: ("timed out after 4 s", "timeout"),
        2: ("ended its process (exit status 3) twice", "crash"),
    }


def test_a_reward_that_always_hangs_ends_the_run_after_a_bounded_number_of_responses(ray_cluster, monkeypatch):
    monkeypatch.setattr(pool_module, "_MAX_FAILURES_IN_A_ROW", 3)
    hang = "time.sleep(99)"
    with pool("does", timeout_s=0.6) as rewards:
        # A score in between, so the reward is not broken.
        batch = batch_of(hang, hang, "3", hang, hang)
        assert [result.failure for result in score(rewards, batch)] == ["timeout", "timeout", "", "timeout", "timeout"]
        message = r"user_rewards:does failed on 3 responses in a row: on the last it timed out after 0\.6 s; correct it, or raise data\.rew"
        with pytest.raises(UserError, match=message):
            score(rewards, batch_of(*[hang] * 1000))


def test_closing_ends_a_worker_that_hangs_and_all_that_it_started(ray_cluster):
    marker = f"{97.5 + time.monotonic() % 1}"
    rewards = pool("does", workers=2)
    batch = batch_of(*[f"subprocess.Popen(['sleep', '{marker}'], start_new_session=True); {BACKTRACKING}"] * 2)
    rewards.ready()
    futures = [rewards.submit(*pair) for pair in batch]
    deadline = time.monotonic() + 20
    while len(alive(marker)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    children = alive("megatron_aspo.rewards.child")
    assert len(alive(marker)) == 2 and len(children) >= 2
    rewards.close()
    for future in futures:
        with pytest.raises(UserError, match="user_rewards:does was stopped"):
            future.result(20)
    wait_until_gone(lambda: alive(marker))


def test_a_worker_that_is_killed_between_responses_ends_its_child_and_is_replaced(ray_cluster):
    with pool("does") as rewards:
        (result,) = score(rewards, batch_of("1"))
        child = psutil.Process(result.details["pid"])
        os.kill(child.ppid(), signal.SIGKILL)
        assert not psutil.wait_procs([child], timeout=10)[1]
        (again,) = score(rewards, batch_of("22"))
        assert (again.score, again.failure) == (2.0, "") and again.details["pid"] != child.pid
        loss = f"a reward worker {DIED} on a response to prompt train/0; a new one takes its place"
        assert rewards.take_losses() == [loss] and not rewards.take_losses()


@pytest.mark.parametrize(
    ("number", "reason", "failure"),
    [(signal.SIGKILL, DIED, "crash"), (signal.SIGSTOP, "froze (no answer in 4 s)", "timeout")],
)
def test_a_response_whose_worker_dies_or_freezes_is_retried_once_and_then_fails(
    ray_cluster, tmp_path, monkeypatch, number, reason, failure
):
    """The first response does it to its worker once, the third to every worker."""
    monkeypatch.setattr(remote, "_PING_S", 2.0)
    harm = f"open('{tmp_path}/pids', 'a').write(f'{{os.getppid()}} {{os.getpid()}} '); os.kill(os.getppid(), {int(number)}); time.sleep(99)"
    once = f"os.path.exists('{tmp_path}/harmed') or (open('{tmp_path}/harmed', 'x'), exec({harm!r}))"
    with pool("does", timeout_s=2.0) as rewards:
        results = score(rewards, batch_of(once, "22", harm, "4444"))
        losses = rewards.take_losses()
    assert [result.score for result in results] == [len(once), 2.0, -2.5, 4.0]
    assert [result.failure for result in results] == ["", "", failure, ""]
    assert results[2].reason == f"lost two workers: one {reason} and one {reason}" and results[2].details == {"failed": True}
    assert [line.split("; ")[0] for line in losses] == [f"a reward worker {reason} on a response to prompt train/{i}" for i in (0, 2, 2)]
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 6
    wait_until_gone(lambda: [pid for pid in pids if psutil.pid_exists(pid)])  # Ray takes several seconds to kill a stopped process


def test_every_worker_takes_one_unit_of_the_resource_that_pins_it_to_nodes(ray_cluster):
    message = r"data\.reward_workers=2 take 1 each of data\.reward_resource=graders, of which the Ray cluster has 0; start its nodes with"
    with pytest.raises(UserError, match=message):
        pool("length", workers=2, resource="graders")
    with pytest.raises(UserError, match="of which the Ray cluster has 1"):
        pool("length", workers=2, resource=RESOURCE)
    with pool("length", resource=RESOURCE) as rewards:
        assert [result.score for result in score(rewards, batch_of("1", "22"))] == [1.0, 2.0]
        deadline = time.monotonic() + 10  # Ray's counts lag behind
        while ray.available_resources().get(RESOURCE, 0):
            assert time.monotonic() < deadline
            time.sleep(0.1)


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
    with RewardPool("dataset", options, workers=2) as rewards:
        before = set(psutil.pids())
        results = score(rewards, [(make_prompt(truth), f"```python\n{code}\n```") for code in [*programs] * 2])
        assert [result.score for result in results] == [*programs.values()] * 2
        assert not any(result.failure for result in results)
        assert {result.details["verdict"] for result in results[:4]} >= {"passed", "wrong answer"}
    wait_until_gone(lambda: [pid for pid in set(psutil.pids()) - before if "bwrap" in _name(pid)])


def wait_until_gone(left):
    """Wait: a process that was sent SIGKILL exists until the kernel handles it."""
    deadline = time.monotonic() + 20
    while pids := left():
        assert time.monotonic() < deadline, pids
        time.sleep(0.1)


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.NoSuchProcess:
        return ""
