"""The algorithm's options in whole runs: their effect on the loop, the data and the metrics."""

import json

import pyarrow.parquet as parquet
import pytest
import yaml

from tests.e2e.workplace import metrics, train, train_here
from tests.models import rope_scaling, save_tiny
from tests.tokenizers import byte_tokenizer

pytestmark = pytest.mark.long


def drawn(run, step: int) -> list[tuple[str, set[float]]]:
    """Return a step's groups in the order of generation: the prompt's id, and its responses' rewards."""
    rows = parquet.read_table(run / "rollouts" / f"step_{step}.parquet").to_pylist()
    return [(rows[i]["prompt_id"], {row["shaped_reward"] for row in rows[i : i + 4]}) for i in range(0, len(rows), 4)]


def test_a_custom_loss_trains_on_resampled_groups(workplace):
    """Two data-parallel ranks, the engine's logprobs as the old ones, the quantile over the mini-batch."""
    overrides = [
        "steps=2",
        "evaluation.draws=0",
        "rollout.engines=1",
        "trainer.tensor_parallel=1",
        "trainer.data_parallel=2",
        "data.reward=my_rewards:half_alike",
        "algorithm.policy_loss=my_losses:gated",
        "algorithm.policy_loss_options={strength: 2.0}",
        "algorithm.group_filter=resample",
        "algorithm.resample_rounds=1",
        "algorithm.old_logprobs=rollout",
        "algorithm.advantage=rloo",
        "algorithm.aggregation=seq_mean_token_mean",
        "algorithm.entropy_quantile_scope=mini_batch",
    ]
    status, out, error = train(workplace, "name=own", *overrides)
    assert status == 0, error
    run = workplace / "runs" / "own"
    order = []
    for step, figures in enumerate(metrics(run)):
        groups = drawn(run, step)
        order += [prompt for prompt, _ in groups]
        differ = [len(rewards) > 1 for _, rewards in groups]
        # Four prompts, then once one more for each of them whose rewards are all equal.
        assert len(groups) == 4 + differ[:4].count(False) and figures["groups/resampled"] == len(groups) - 4
        assert figures["groups/dropped"] == differ.count(False) and figures["groups/missing"] == 4 - differ.count(True)
        assert (f"step {step + 1}: 1 extra generations" in out) == (figures["groups/missing"] > 0)
        assert figures["mismatch/max"] <= 1e-4 and figures["train/gradient_norm"] > 0
        # 1 / cosh² of the gate's argument.
        assert 0 < figures["train/weight/positive"] <= 1 and figures["train/weight/positive"] != figures["train/weight/negative"]
    # Extra prompts continue where the last ones ended: every epoch over a file visits each of its prompts once.
    assert len(order) > 8
    for name, size in (("train", 6), ("more", 2)):
        epochs = [prompt for prompt in order if f"/{name}/" in prompt]
        assert all(len(set(epochs[n : n + size])) == len(epochs[n : n + size]) for n in range(0, len(epochs), size))
    first, second = metrics(run)
    assert first["groups/resampled"] + second["groups/resampled"] > 0


@pytest.mark.parametrize("kind", ["yarn", pytest.param("linear", marks=pytest.mark.nightly)])
def test_archers_reference_starts_at_learning_rate_zero_and_keeps_its_values(workplace, kind):
    """On Qwen3 with scaled rotary embeddings, over 300 tokens of 64 times 8, whose engine must agree after a transfer too."""
    rope = rope_scaling(kind, factor=8.0, **{"original_max_position_embeddings": 64} if kind == "yarn" else {})
    tokenizer = byte_tokenizer()
    save_tiny("qwen3", workplace / kind, tied=True, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **rope)
    tokenizer.save_pretrained(workplace / kind)
    rows = [{"prompt": f"{i}: " + "the quick brown fox " * 15, "ground_truth": "aeiou"} for i in range(8)]
    (workplace / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        f"model={kind}",
        "data.path=long.jsonl",
        "data.weights=",
        "data.eval_path=",
        "data.max_prompt_tokens=400",
        "preset=archer_reference",
        "steps=3",
        "evaluation.draws=0",
        "rollout.engines=1",
        "trainer.tensor_parallel=1",
    ]
    shaping = ["algorithm.overlong_buffer_tokens=8", "algorithm.overlong_factor=0.5"]
    status, _out, error = train(workplace, f"name={kind}", *overrides, *shaping)
    assert status == 0, error
    run = workplace / "runs" / kind
    first, second, third = metrics(run)
    assert (first["train/learning_rate"], second["train/learning_rate"]) == (0.0, 2e-3)
    assert third["train/kl"] > 1e-4 and third["mismatch/max"] <= 1e-4
    # Rate 0 left the weights unchanged: the reference is still the policy, and every ratio is 1.
    assert first["train/kl"] == pytest.approx(0, abs=1e-6) and first["train/weight_distance"] < 1e-4 < second["train/weight_distance"]
    assert yaml.safe_load((run / "config.yaml").read_text())["algorithm"]["kl_value_clamp"] == 10.0
    rows = [row for step in range(3) for row in parquet.read_table(run / "rollouts" / f"step_{step}.parquet").to_pylist()]
    assert max(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows) >= 300
    for row in rows:
        penalty = min(0, -(len(row["response_ids"]) - (16 - 8)) / 8) * 0.5
        assert row["shaped_reward"] == pytest.approx(row["reward"] + penalty, abs=1e-12)
    assert any(row["shaped_reward"] < row["reward"] for row in rows)
    assert first["reward/shaped_mean"] < first["reward/mean"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.policy_loss=my_losses:absent"], "has no absent; correct the name"),
        (
            ["algorithm.policy_loss=my_losses:gated", "algorithm.policy_loss_options={strenth: 2}"],
            "cannot be called as (tokens, strenth=…)",
        ),
    ],
)
def test_a_loss_that_cannot_be_called_is_refused_before_anything_starts(workplace, overrides, message):
    status, out, error = train_here(workplace, "name=refused", *overrides)
    assert status == 2 and message in error and "starting Ray" not in out
    assert not (workplace / "runs" / "refused").exists()


def test_a_loss_that_fails_in_training_ends_the_run_in_one_line_and_leaves_its_name_free(workplace):
    overrides = ["algorithm.policy_loss=my_losses:broken", "evaluation.draws=0", "rollout.engines=1", "trainer.tensor_parallel=1"]
    status, _out, error = train(workplace, "name=broken", *overrides)
    assert status == 2
    line = error.strip().splitlines()[-1]
    assert line.startswith("megatron-aspo: error: algorithm.policy_loss=my_losses:broken: AttributeError: ") and "check-loss" in line
    assert not (workplace / "runs" / "broken").exists()
