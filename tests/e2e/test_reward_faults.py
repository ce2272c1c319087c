"""Runs whose reward hangs, on one response and on every one, and whose reward workers die and freeze."""

import contextlib
import json

import psutil
import pyarrow.parquet as parquet
import pytest

from tests.e2e.workplace import metrics, train

pytestmark = pytest.mark.long
REWARDS = '''
import os
import signal
import time


def once(prompt, response, ground_truth, extra):
    """Hangs on the first response that is ever scored, kills its worker on the second and freezes its worker on the third."""
    for mischief in ("hang", "kill", "freeze"):
        try:
            with open(mischief, "x") as file:
                file.write(prompt + response)
        except FileExistsError:
            if open(mischief).read() == prompt + response:  # the second attempt at it
                break
            continue
        if mischief != "hang":
            os.kill(os.getppid(), signal.SIGKILL if mischief == "kill" else signal.SIGSTOP)
        time.sleep(999)
    return len(set(response)) / max(1, len(response))


def always(prompt, response, ground_truth, extra):
    time.sleep(999)
'''
SMALL = ["steps=1", "rollout.engines=1", "trainer.tensor_parallel=1", "evaluation.draws=0", "rollout.prompts_per_step=2"]


def children_in(workplace) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(workplace) and "megatron_aspo.rewards.child" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def test_a_reward_that_hangs_costs_one_response_and_workers_that_die_or_freeze_cost_none(workplace, monkeypatch):
    (workplace / "stuck.py").write_text(REWARDS)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal, where phases are shown
    limit = ["data.reward=stuck:once", "data.reward_timeout_s=2", "data.reward_failure_score=-0.25"]
    status, out, error = train(workplace, "name=hung", *SMALL, *limit)
    assert status == 0, error
    run = workplace / "runs" / "hung"
    (step,) = metrics(run)
    assert (step["reward/timeouts"], step["reward/crashes"], step["reward/worker_restarts"], step["train/updates"]) == (1, 0, 2, 2)
    assert step["seconds/generate"] + step["seconds/reward"] >= 2
    rows = parquet.read_table(run / "rollouts" / "step_0.parquet").to_pylist()
    (hung,) = [row for row in rows if "failed" in row["reward_details"]]
    assert hung["reward"] == -0.25 and json.loads(hung["reward_details"]) == {"reason": "timed out after 2 s", "failed": True}
    assert len(rows) == 8 and all(row["reward"] > 0 for row in rows if row is not hung)
    message = "data.reward=stuck:once timed out after 2 s; its reward is -0.25 (data.reward_failure_score)"
    assert f"prompt {hung['prompt_id']}, response {hung['index']}: {message}" in out
    for end in ("died (killed, out of memory, or its node was lost)", "froze (no answer in 12 s)"):
        assert f"a reward worker {end} on a response to prompt" in out
    assert "step 1/1: scoring …" in out
    assert not children_in(workplace)


@pytest.mark.nightly
def test_a_reward_that_always_hangs_ends_the_run_with_one_line(workplace):
    (workplace / "stuck.py").write_text(REWARDS)
    limit = ["data.reward=stuck:always", "data.reward_timeout_s=0.3", "rollout.responses_per_prompt=2"]
    status, out, error = train(workplace, "name=always", *SMALL, *limit)
    assert status == 2
    assert error.strip().splitlines()[-1] == (
        "megatron-aspo: error: data.reward=stuck:always failed on all of 4 responses: on the last it timed out after 0.3 s; correct it, or "
        "raise data.reward_timeout_s"
    )
    assert "Traceback" not in error and "data.reward=stuck:always failed on 4 of 4 responses" in out
    assert not (workplace / "runs" / "always").exists() and not children_in(workplace)
