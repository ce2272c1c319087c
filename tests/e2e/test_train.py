"""The whole command on this machine: real Ray, vLLM and Megatron, called as a user calls it."""

import json
import shutil
import signal
from pathlib import Path

import mistral_common
import numpy as np
import psutil
import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_aspo.checkpoint.convert import convert, open_source
from megatron_aspo.common.process_tree import mapped_segments
from megatron_aspo.rollout.engine import Request
from megatron_aspo.rollout.options import RolloutOptions
from megatron_aspo.rollout.pool import EnginePool
from tests.e2e.loopback import assert_only_loopback
from tests.e2e.workplace import STEPS, metrics, start, train, wait_for
from tests.models import rope_scaling, save_tiny

HEALTH = [
    "reward/mean",
    "reward/timeouts",
    "reward/crashes",
    "train/entropy",
    "train/kl",
    "train/hard_mask_share/positive",
    "train/hard_mask_share/negative",
    "train/soft_cap_share/positive",
    "train/soft_cap_share/negative",
    "train/weight/positive",
    "train/weight/negative",
    "train/weight_distance",
    "train/weight_distance/positive",
    "train/weight_distance/negative",
    "response/repetition_share",
    "response/repetition_top_count",
    "response/length_mean",
    "response/length_max",
    "response/cut_off_share",
    "groups/solved_by_all",
    "groups/solved_by_none",
    "groups/dropped",
    "groups/resampled",
    "train/gradient_norm",
    "packing/fill",
    "packing/imbalance",
    "train/skipped_updates",
    "train/learning_rate",
    "mismatch/mean",
    "mismatch/max",
    "mismatch/k3",
    "staleness/mean",
    "tokens/generated_per_s",
    "tokens/trained_per_s",
    "seconds/generate",
    "seconds/reward",
    "seconds/logprobs",
    "seconds/update",
    "seconds/publish",
    "seconds/step",
]
"""Health metrics of the algorithm, by our names."""


def test_engine_and_trainer_agree_on_every_token_of_every_step(whole):
    """float32, tied, prompts over 128 tokens, two engines, after 0 to 3 rounds of updates."""
    steps = metrics(whole)
    assert len(steps) == STEPS
    for step in steps:
        assert step["mismatch/max"] <= 1e-4, step
        assert step["train/updates"] == 4
    # The weights did change, otherwise agreement would prove nothing.
    assert steps[2]["train/kl"] > 1e-3


def test_every_health_metric_is_logged_and_training_is_off_policy(whole):
    for step in metrics(whole):
        assert set(HEALTH) <= set(step)
        assert step["train/weight_distance"] > 1e-3
    assert any(step["train/hard_mask_share/positive"] + step["train/hard_mask_share/negative"] > 0 for step in metrics(whole))


def test_rollouts_carry_the_version_that_sampled_them(whole):
    for step in range(STEPS):
        rows = parquet.read_table(whole / "rollouts" / f"step_{step}.parquet").to_pylist()
        assert {span["version"] for row in rows for span in row["versions"]} == {step}
        assert all(row["versions"][-1]["stop"] == len(row["response_ids"]) == len(row["rollout_logprobs"]) for row in rows)


@pytest.mark.long
def test_transformers_and_a_fresh_vllm_load_the_checkpoint(whole, ray_cluster):
    directory = whole / "exports" / f"step_{STEPS}"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    pool = EnginePool(str(directory), RolloutOptions(dtype="float32", max_running_requests=4, threads=1), max_model_len=256)
    try:
        pool.start()
        prompt = tuple(range(10, 150))
        (generation,) = pool.generate([Request("one", prompt, seed=0, max_tokens=16, temperature=0.0)])
    finally:
        pool.shutdown()
    ids = torch.tensor([[*prompt, *generation.token_ids.tolist()]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == generation.token_ids.tolist()


@pytest.mark.long
def test_another_loss_and_another_task_need_one_override_each(workplace):
    """On the tied model's byte tokenizer no response is right, so that no group has different rewards; the run reports it and ends well."""
    overrides = [
        "algorithm.policy_loss=ppo_clip",
        "task=largest_of_three",
        "data.path=",
        "data.weights=",
        "data.eval_path=",
        "data.reward=",
        "rollout.engines=1",
        "data.chat_template=short.jinja",
        "data.chat_template_kwargs={opening: Well}",
        "data.system_prompt=Count.",
    ]
    template = "{% for m in messages %}({{ m.content }}){% endfor %}{{ opening }}"
    (workplace / "short.jinja").write_text(template)
    reward = ["algorithm.group_filter=none", "algorithm.kl_in=reward", "algorithm.kl_estimator=k1", "algorithm.kl_coef=0.1"]
    status, _out, error = train(workplace, "name=other", *overrides, *reward, "steps=2", "trainer.tensor_parallel=1")
    assert status == 0, error
    first, step = metrics(workplace / "runs" / "other")
    # The reference is the model at the start.
    assert abs(first["train/kl_penalty"]) < 1e-4 < abs(step["train/kl_penalty"])
    assert step["train/updates"] == 4 and yaml.safe_load((workplace / "runs/other/config.yaml").read_text())["task"] == "largest_of_three"
    rows = parquet.read_table(workplace / "runs/other/rollouts/step_0.parquet").to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(workplace / "runs/other/exports/step_2")
    assert {tokenizer.decode(row["prompt_ids"]) == f"(Count.)({row['prompt']})Well" for row in rows} == {True}
    assert tokenizer.chat_template == template and {row["data_source"] for row in rows} == {"largest_of_three"}


@pytest.mark.long
def test_a_model_with_a_sentencepiece_tokenizer_trains_and_keeps_it(workplace):
    """A Llama whose vocabulary is in tokenizer.model alone, with Llama 3's scaled rotary embeddings over 300 tokens of 64 times 8, given as
    a torch_dist checkpoint; prompts are plain strings.
    """
    pieces = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    rope = rope_scaling("llama3", original_max_position_embeddings=64)
    save_tiny("llama", workplace / "pieces", vocab_size=32000, tied=True, eos_token_ids=[2], **rope)
    shutil.copyfile(pieces, workplace / "pieces" / "tokenizer.model")
    (workplace / "pieces" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    convert(open_source(workplace / "pieces"), workplace / "dist", to="torch_dist")
    rows = [{"prompt": f"{i}: " + "the quick brown fox " * 49, "ground_truth": "aeiou"} for i in range(8)]
    (workplace / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = ["steps=1", "trainer.tensor_parallel=1", "rollout.engines=1", "evaluation.draws=0", "rollout.max_response_tokens=64"]
    status, out, error = train(workplace, "name=pieces", "model=dist", "data.path=plain.jsonl", "data.weights=", "data.eval_path=", *few)
    assert status == 0, error
    assert "plain-text prompts: no token is put first" in out
    (step,) = metrics(workplace / "runs" / "pieces")
    assert step["mismatch/max"] <= 1e-4 and step["train/updates"] == 4 and step["reward/mean"] > 0
    exported = workplace / "runs" / "pieces" / "exports" / "step_1"
    assert (exported / "tokenizer.model").read_bytes() == pieces.read_bytes()
    # AutoTokenizer alone would order the merges of tokenizer.model differently from its training.
    assert AutoTokenizer.from_pretrained(exported)("a  b   c")["input_ids"] == SentencePieceProcessor(str(pieces)).encode("a  b   c")
    rows = parquet.read_table(workplace / "runs" / "pieces" / "rollouts" / "step_0.parquet").to_pylist()
    assert max(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows) >= 300
    processor = SentencePieceProcessor(model_file=str(pieces))
    assert all(row["prompt_ids"][-20:] == processor.encode(row["prompt"])[-20:] for row in rows)


@pytest.mark.long
def test_an_engine_that_does_not_start_ends_the_run_with_its_own_error(workplace, monkeypatch):
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/nowhere")
    status, _, error = train(workplace, "name=dead", "trainer.tensor_parallel=1", "rollout.engines=1")
    assert status == 2
    line = error.strip().splitlines()[-1]
    assert line.startswith("megatron-aspo: error: engine 0 did not start: ") and len(line) > 70
    assert not (workplace / "runs" / "dead").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGINT, 130, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, 143, id="SIGTERM", marks=pytest.mark.nightly),  # the same handler
        pytest.param(signal.SIGKILL, -9, id="SIGKILL"),
    ],
)
def test_a_stopped_run_leaves_no_process_behind(workplace, number, status):
    """Nor shared memory; and until then it listens on loopback only: Ray's processes, training ranks, engines and their workers."""
    name = f"stopped_{int(number)}"
    process = start(workplace, f"name={name}", "steps=1000", "rollout.engines=1", "trainer.tensor_parallel=1", "evaluation.draws=0")
    metrics_file = workplace / "runs" / name / "metrics.jsonl"
    wait_for(process, lambda: metrics_file.exists() and metrics_file.stat().st_size)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 4
    assert_only_loopback([psutil.Process(process.pid), *family])
    segments = mapped_segments(family)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    if number != signal.SIGKILL:
        assert error.strip().splitlines()[-1] in ("megatron-aspo: interrupted", "megatron-aspo: terminated")
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert not any((Path("/dev/shm") / segment).exists() for segment in segments)
    # The completed steps are complete on disk.
    assert all(np.isfinite(step["train/loss"]) for step in metrics(workplace / "runs" / name))
