"""The code reward names the prompt whose row, or the machine, prevents grading."""

import json

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards.code.options import CodeOptions
from megatron_aspo.rewards.code.reward import CodeReward
from megatron_aspo.rewards.sandbox.options import Limits, SandboxOptions
from megatron_aspo.rewards.sandbox.pool import SandboxPool
from megatron_aspo.rewards.sandbox.sandbox import SandboxError
from megatron_aspo.tasks.dataset import DatasetTask
from megatron_aspo.tasks.options import DataOptions

RESPONSE = "```python\ndef f(x=None):\n    return 1\n```"


def prompt(truth) -> Prompt:
    return Prompt("train/7", (), "Write f.", truth, "dataset", {}, 7)


class Letters:
    """An encoder with one token per character."""

    def text(self, text):
        return tuple(map(ord, text))

    def check_options_used(self):
        pass


@pytest.fixture(scope="module")
def reward(sandboxed):
    reward = CodeReward(CodeOptions(limits=Limits(cpu_s=5, wall_s=20)))
    yield reward
    reward.close()


def test_a_faulty_row_is_refused_naming_its_prompt(reward):
    with pytest.raises(UserError, match="on prompt train/7: ground_truth has no tests"):
        reward(prompt([]), RESPONSE)


def test_a_test_that_cannot_run_is_not_the_responses_fault(reward):
    assert reward(prompt({"functional": "assert f() == 1"}), RESPONSE).score == 1.0
    with pytest.raises(UserError, match=r"on prompt train/7: test 0 cannot run here: the tests pass a function.*remove the row"):
        reward(prompt({"functional": "f(lambda: 1)"}), RESPONSE)


def test_a_program_cannot_fake_an_unsupported_test(reward):
    forged = json.dumps({"value": {"c": [{"r": 1}, 0]}, "changed": []}) + "\n"
    code = f"import os\ndef f():\n    for number in range(3, 40):\n        try:\n            os.write(number, {forged.encode()!r})\n        except OSError:\n            pass\n    return 1\n"
    result = reward(prompt({"functional": "assert f() == 1"}), f"```python\n{code}```")
    assert result.score == 0.0 and result.details["verdict"] == "runtime error", result


def test_a_machine_without_memory_for_a_sandbox_is_reported_with_the_cause(reward, monkeypatch):
    def fail(*_):
        raise SandboxError("no process or control group can be made: [Errno 11]")

    monkeypatch.setattr(SandboxPool, "take", fail)
    with pytest.raises(UserError, match=r"train/7: no code sandbox starts .*Errno 11.*free memory or processes"):
        reward(prompt({"functional": "assert f() == 1"}), RESPONSE)


def test_a_sandbox_that_cannot_be_started_is_tried_three_times(sandboxed, monkeypatch):
    pool = SandboxPool(SandboxOptions(pool=1), Limits())
    start, calls = pool._start, []

    def fail_twice():
        calls.append(1)
        if len(calls) < 3:
            raise SandboxError("no process")
        return start()

    try:
        while pool._waiting:
            pool._waiting.popleft().kill()
        monkeypatch.setattr(pool, "_start", fail_twice)
        pool.take().kill()
        assert len(calls) >= 3
    finally:
        pool.close()


def test_faulty_rows_are_refused_at_loading(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "a", "ground_truth": {"functional": "assert f()"}},
        {"prompt": "b", "ground_truth": {"inputs": ["1"], "outputs": []}},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"rows.jsonl:2: ground_truth needs lists inputs and outputs of the same length"):
        DatasetTask(DataOptions(path=[str(path)], reward="code", max_prompt_tokens=10), Letters(), 0)
    DatasetTask(DataOptions(path=[str(path)], reward="some.module:f", max_prompt_tokens=10), Letters(), 0)
