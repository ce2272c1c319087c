"""A user's directory, and the commands that a user gives there."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import yaml

from megatron_aspo.cli import main
from tests.in_process import run_main
from tests.models import save_tiny
from tests.tokenizers import byte_tokenizer

ROOT = Path(__file__).parents[2]
RUN_S = 400.0
"""Limit for any one run: on a busy machine runs take many times longer than on an idle one."""
STEPS = 4
"""Overrides of the run that most tests read."""
WHOLE = [f"steps={STEPS}", "checkpoint.every=1", "checkpoint.keep_last=0"]
REWARDS = '''
def vowels(prompt, response, ground_truth, extra):
    """Share of the response's letters that occur in the ground truth; differs between the responses of a group."""
    return sum(letter in ground_truth for letter in response) / max(1, len(response))


def half_alike(prompt, response, ground_truth, extra):
    """Every second prompt gives all its responses the same reward."""
    return 0.5 if int(prompt.split(":")[0]) % 2 else vowels(prompt, response, ground_truth, extra)
'''
LOSSES = '''
def gated(tokens, *, strength=1.0):
    """A soft gate on the ratio."""
    return -tokens.advantages * (strength * tokens.log_ratio).tanh() / strength


def broken(tokens):
    return tokens.rewards
'''


def make_workplace(directory: Path) -> None:
    """Make tied models, prompts of more than 128 tokens, custom rewards and a custom policy loss, and a recipe."""
    tokenizer = byte_tokenizer()
    for name, family in (("model", "qwen2"), ("qwen3", "qwen3")):
        save_tiny(family, directory / name, tied=True, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        tokenizer.save_pretrained(directory / name)
    (directory / "my_rewards.py").write_text(REWARDS)
    (directory / "my_losses.py").write_text(LOSSES)
    rows = [{"prompt": [{"role": "user", "content": f"{i}: " + "the quick brown fox " * 8}], "ground_truth": "aeiou"} for i in range(12)]
    verl = [{"prompt": row["prompt"], "reward_model": {"ground_truth": row["ground_truth"]}, "data_source": "words"} for row in rows[:6]]
    parquet.write_table(pa.Table.from_pylist(verl), directory / "train.parquet")
    for name, chosen in (("more", rows[6:8]), ("held_out", rows[8:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    recipe = {
        "model": "model",
        "task": "dataset",
        "steps": 3,
        "deterministic": True,
        "data": {
            "path": ["train.parquet", "more.jsonl"],
            "weights": [1, 1],
            "eval_path": "held_out.jsonl",
            "reward": "my_rewards:vowels",
            "max_prompt_tokens": 256,
        },
        "algorithm": {"epochs": 2, "mini_batch_prompts": 2},
        "trainer": {"dtype": "float32", "tensor_parallel": 2, "micro_batch_tokens": 512, "threads": 1},
        "optimizer": {"lr": 2e-3, "warmup_steps": 1},
        "rollout": {
            "engines": 2,
            "dtype": "float32",
            "prompts_per_step": 4,
            "responses_per_prompt": 4,
            "max_response_tokens": 16,
            "threads": 1,
        },
        "evaluation": {"draws": 2},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def start(workplace: Path, *overrides: str) -> subprocess.Popen:
    return start_command(workplace, "train", "recipe.yaml", *overrides)


def start_command(workplace: Path, *words: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_aspo", *words],
        cwd=workplace,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(workplace: Path, *overrides: str) -> tuple[int, str, str]:
    process = start(workplace, *overrides)
    out, error = process.communicate(timeout=RUN_S)
    return process.returncode, out, error


def wait_for(process: subprocess.Popen, condition: Callable[[], object], poll_s: float = 0.02) -> None:
    """Return as soon as the condition holds. A process that ends first, or takes longer than a run may, is killed and fails the test."""
    deadline = time.monotonic() + RUN_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"the condition never held; status {process.wait()}: {process.stderr.read()}")
        time.sleep(poll_s)


def train_here(workplace: Path, *overrides: str) -> tuple[int, str, str]:
    """Like `train`, in this process: for a command that starts no other."""
    done = run_main(main, "train", "recipe.yaml", *overrides, cwd=workplace)
    return done.returncode, done.stdout, done.stderr


def metrics(run: Path) -> list[dict]:
    """Return the metrics of each step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(run: Path) -> list[dict]:
    """Return the metrics that do not depend on the machine's speed."""
    return [without_timings(step) for step in metrics(run)]


def without_timings(step: dict) -> dict:
    """Return the metrics of a step that do not depend on the machine's speed."""
    return {name: value for name, value in step.items() if not name.startswith("seconds/") and not name.endswith("_per_s")}
