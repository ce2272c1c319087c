"""examples/recipes/laptop_code.yaml: it can be planned and its rows are accepted. tests/code/test_laptop_code.py grades programs."""

from dataclasses import replace

import pytest

from megatron_aspo.config import Config, load_config
from megatron_aspo.data.encoder import PromptEncoder
from megatron_aspo.runtime.plan import make_plan
from megatron_aspo.tasks.dataset import DatasetTask
from tests.models import save_tiny
from tests.tokenizers import byte_tokenizer
from tests.unit.test_packaging import ROOT


@pytest.fixture
def config(monkeypatch, tmp_path) -> Config:
    """Return the recipe, with a small model of the same family instead of its own, which must be downloaded."""
    save_tiny("llama", tmp_path / "model")
    monkeypatch.chdir(ROOT)
    return load_config(ROOT / "examples/recipes/laptop_code.yaml", [f"model={tmp_path}/model"])


def test_it_plans_for_two_cores_with_room_for_every_response_of_a_step(config):
    plan = make_plan(config, "cpu")
    assert len(plan.ranks) == 1
    rollout = config.rollout
    assert rollout.prompts_per_step % config.algorithm.mini_batch_prompts == 0
    assert rollout.prompts_per_step * rollout.responses_per_prompt <= rollout.engines * rollout.max_running_requests


def test_an_epoch_has_each_training_problem_once_and_no_held_out_one(config):
    options = replace(config.data, max_prompt_tokens=1000)  # one token for each byte
    tokenizer = byte_tokenizer()
    task = DatasetTask(options, PromptEncoder(tokenizer, len(tokenizer), options), config.seed)
    training = [task.prompt(number) for number in range(30)]
    held_out = task.held_out()
    assert len({prompt.text for prompt in training}) == 30 and len({prompt.text for prompt in held_out}) == 20
    assert not {prompt.text for prompt in training} & {prompt.text for prompt in held_out}
    assert {prompt.text for prompt in training} == {task.prompt(number).text for number in range(30, 60)}
    for prompt in training + held_out:
        assert tokenizer.decode(prompt.token_ids).startswith(f"<system>{options.system_prompt}</s><user>")


def test_the_example_in_the_prompts_is_in_neither_file(config):
    for path in (*config.data.path, *config.data.eval_path):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert "def is_zero" in text and '"fn_name": "is_zero"' not in text
        assert text.count("def ") == len(text.splitlines())  # no other solution is shown
