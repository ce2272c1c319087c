"""A run whose reward hangs: on one response, and on every one."""

import contextlib
import json

import psutil
import pyarrow.parquet as parquet
import pytest

from tests.e2e.workplace import metrics, train

REWARDS = '''
import time


def once(prompt, response, ground_truth, extra):
    """Hangs on the first response that is ever scored."""
    try:
        open("hung", "x").close()
    except FileExistsError:
        return len(set(response)) / max(1, len(response))
    time.sleep(999)


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


def test_a_reward_that_hangs_on_one_response_costs_that_response(workplace, monkeypatch):
    (workplace / "stuck.py").write_text(REWARDS)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal: phases are shown
    limit = ["data.reward=stuck:once", "data.reward_timeout_s=2", "data.reward_failure_score=-0.25"]
    status, out, error = train(workplace, "name=hung", *SMALL, *limit)
    assert status == 0, error
    run = workplace / "runs" / "hung"
    (step,) = metrics(run)
    assert (step["reward/timeouts"], step["reward/crashes"], step["train/updates"]) == (1, 0, 2)
    assert 2 <= step["seconds/reward"] < 10
    rows = parquet.read_table(run / "rollouts" / "step_0.parquet").to_pylist()
    (hung,) = [row for row in rows if "failed" in row["reward_details"]]
    assert hung["reward"] == -0.25 and json.loads(hung["reward_details"]) == {"reason": "timed out after 2 s", "failed": True}
    assert len(rows) == 8 and all(row["reward"] > 0 for row in rows if row is not hung)
    said = "data.reward=stuck:once timed out after 2 s; its reward is -0.25 (data.reward_failure_score)"
    assert f"prompt {hung['prompt_id']}, response {hung['index']}: {said}" in out
    assert "step 1/1: scoring …" in out
    assert not children_in(workplace)


@pytest.mark.slow
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
