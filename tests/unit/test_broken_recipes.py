"""Recipes with common mistakes: each ends `megatron-aspo train` with one line, before Ray is started."""

import pytest

from megatron_aspo import cli
from megatron_aspo.config import load_config
from megatron_aspo.runtime import processes
from tests.in_process import run_main
from tests.models import save_tiny
from tests.tokenizers import byte_tokenizer

HEAD = "model: model\ntask: single_digit_addition\n"
DATA = "model: model\ntask: dataset\n"
REWARDS = """
def score(prompt, response, ground_truth, extra):
    return 1.0

def three(prompt, response, ground_truth):
    return 1.0
"""
ROW = '{"prompt": [{"role": "user", "content": "Name a prime."}], "ground_truth": "7"}\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("broken") / "model"
    tokenizer = byte_tokenizer()
    save_tiny("qwen2", directory, tied=True, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=65536)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def directory(tmp_path, model, monkeypatch):
    def started(*_):
        raise AssertionError("Ray was about to be started")

    monkeypatch.setattr(processes, "open_cluster", started)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "train.jsonl").write_text(ROW)
    (tmp_path / "held_out.jsonl").write_text(ROW.replace("prime", "square"))
    (tmp_path / "twice.jsonl").write_text('{"prompt": "a", "prompt": "b", "ground_truth": "7"}\n')
    (tmp_path / "no_truth.jsonl").write_text('{"prompt": "a"}\n')
    return tmp_path


def data(**changes: str) -> str:
    fields = {"path": "train.jsonl", "eval_path": "held_out.jsonl", "reward": "my_rewards:score"} | changes
    return DATA + "data:\n" + "".join(f"  {key}: {value}\n" for key, value in fields.items() if value)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        # YAML that means something other than it seems to.
        (HEAD + "steps: 1\nseed: 0\nsteps: 2\n", "steps occurs twice, in lines 3 and 5; keep one"),
        (HEAD + "optimizer:\n  lr: 1e-6\n  lr: 2e-6\n", "lr occurs twice, in lines 4 and 5; keep one"),
        (HEAD + "trainer:\n", "trainer is a section of keys, not the value None"),
        (HEAD + "trainer: [tensor_parallel]\n", "trainer is a section of keys, not the value ['tensor_parallel']"),
        (HEAD + "  trainer: {}\n", "recipe.yaml is not valid YAML: mapping values are not allowed here"),
        (HEAD + "optimizer: {lr: '1,5'}\n", "optimizer.lr='1,5' is not a finite number"),
        (HEAD + "rollout: {kv_cache_gib: 40GB}\n", "rollout.kv_cache_gib='40GB' is not a finite number"),
        (HEAD + "name: 123\n", "name=123 is not text"),
        (HEAD + "resume: yes\n", "resume=True is not text"),
        (HEAD + "trainer: {recompute: no}\n", "trainer.recompute=False is not text"),
        (HEAD + "rollout: !!python/object:os.system {}\n", "recipe.yaml is not valid YAML: could not determine a constructor"),
        ("model:\ntask: dataset\n", "model=None is not text"),
        # Another project's keys.
        (HEAD + "actor_rollout_ref: {actor: {clip_ratio: 0.2}}\n", "unknown key actor_rollout_ref"),
        (HEAD + "algorithm: {adv_estimator: grpo}\n", "unknown key algorithm.adv_estimator"),
        (HEAD + "algorithm: {advantage: gae}\n", "algorithm.advantage=gae is not known; valid: grpo, reinforce_plus_plus, rloo"),
        (HEAD + "algorithm: {aggregation: token-mean}\n", "algorithm.aggregation=token-mean is not known; did you mean token_mean?"),
        # Options that contradict one another.
        (HEAD + "algorithm: {policy_loss_options: {tau: 1}}\n", "has no effect: it needs a policy loss of your own; remove it"),
        (HEAD + "algorithm: {kl_estimator: k1}\n", "algorithm.kl_estimator=k1 in the loss has no useful gradient"),
        (HEAD + "algorithm: {old_logprobs: rollout, rollout_correction: tis}\n", "there is nothing to correct; set one of them back"),
        (HEAD + "algorithm: {overlong_buffer_tokens: 40000}\n", "is more than rollout.max_response_tokens=32768"),
        (HEAD + "algorithm: {advantage: rloo, advantage_std: false}\n", "has no effect: it needs advantage=grpo; remove it"),
        (HEAD + "trainer: {gradient_dtype: bfloat16, dtype: float32}\n", "set it to float32, or trainer.dtype=bfloat16"),
        (HEAD + "ray_address: auto\n", "ray_address=auto is not of the form HOST:PORT; name the head and its port"),
        # Tasks, data and rewards.
        (HEAD.replace("single_digit_addition", "addition"), "task=addition is unknown; did you mean single_digit_addition?"),
        (HEAD.replace("single_digit_addition", "reasoning_gym:nope"), "reasoning-gym has no task nope; valid: "),
        (DATA, "task=dataset needs data.path, the files of training prompts; set it"),
        (data(path="absent.jsonl"), "absent.jsonl cannot be read (no such file or directory); name a file, a directory, or hub:OWNER/NAME"),
        (data(path="twice.jsonl"), "twice.jsonl:1: not valid JSON (the key 'prompt' occurs twice in one object)"),
        (data(path="no_truth.jsonl"), "no_truth.jsonl:1: the field ground_truth"),
        (data(weights="[1, 2]"), "data.weights has 2 numbers for 1 locations in data.path; give one for each, or none"),
        (data(eval_path=""), "needs data.eval_path, files of held-out prompts, to evaluate; set it, or evaluation.draws=0"),
        (data(reward=""), "task=dataset needs data.reward, which scores a response: math, code, or package.module:function; set it"),
        (data(reward="my_rewards"), "data.reward: my_rewards is no reward; valid: code, math, "),
        (data(reward="my_rewards:scores"), "has no scores; correct the name"),
        (data(reward="my_rewards:three"), "my_rewards:three cannot be called as (prompt, response, ground_truth, extra)"),
        (data(reward="code"), "train.jsonl:1: ground_truth is no known form of tests; expected a list of {input, output, testtype}"),
        (HEAD + "data: {chat_template: absent.jinja}\n", "data.chat_template=absent.jinja cannot be read"),
    ],
    ids=lambda value: value[-40:],
)
def test_a_broken_recipe_ends_with_one_line_that_names_the_mistake(directory, recipe, message):
    (directory / "recipe.yaml").write_text(recipe)
    done = run_main(cli.main, "train", "recipe.yaml", cwd=directory)
    assert done.returncode == 2, done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("megatron-aspo: error: ") and message in line
    assert not (directory / "runs").exists()


def test_keys_may_come_from_an_anchor_and_be_replaced(directory):
    """A merged key is not a duplicate."""
    (directory / "recipe.yaml").write_text("model: model\ntask: single_digit_addition\nrollout: &r {engines: 1}\nevaluation: {draws: 2}\n")
    assert load_config(directory / "recipe.yaml").evaluation.draws == 2
    (directory / "recipe.yaml").write_text(HEAD + "trainer: &t {dtype: float32}\nrollout: {<<: *t, dtype: bfloat16}\n")
    assert load_config(directory / "recipe.yaml").rollout.dtype == "bfloat16"
