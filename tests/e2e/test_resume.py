"""A run that stops goes on: bit for bit at the same layout, with the same prompts at another, and never from what is not whole."""

import hashlib
import json
import time
from pathlib import Path

import psutil
import pyarrow.parquet as parquet
import pytest
from safetensors import safe_open

from megatron_aspo.checkpoint.manifest import read_manifest
from megatron_aspo.rollout.engine import Request
from megatron_aspo.rollout.options import RolloutOptions
from megatron_aspo.rollout.pool import EnginePool
from megatron_aspo.runtime.ledger import history, read_ledger
from tests.e2e.workplace import metrics, start, train

STEPS = 6


@pytest.fixture(scope="module")
def whole(workplace) -> Path:
    """A run that nobody touched; every second step has a checkpoint."""
    status, _, error = train(workplace, "name=whole", f"steps={STEPS}", "checkpoint.every=2", "checkpoint.keep_last=0")
    assert status == 0, error
    return workplace / "runs" / "whole"


def timeless(run: Path) -> dict[int, dict]:
    return {
        step["step"]: {k: v for k, v in step.items() if not k.startswith("seconds/") and not k.endswith("_per_s")} for step in metrics(run)
    }


def tensor_hashes(file: Path) -> dict[str, str]:
    with safe_open(file, "numpy") as handle:
        return {name: hashlib.sha256(handle.get_tensor(name).tobytes()).hexdigest() for name in handle.keys()}  # noqa: SIM118


def test_a_killed_run_goes_on_and_nothing_shows(workplace, whole):
    """SIGKILL on the driver after the fourth step, then `--resume auto`: the same metrics, rollouts, weights and optimizer."""
    overrides = ["name=killed", f"steps={STEPS}", "checkpoint.every=2", "checkpoint.keep_last=0"]
    process = start(workplace, *overrides, "--resume", "auto")
    run = workplace / "runs" / "killed"
    deadline = time.monotonic() + 240
    while not ((run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_bytes().splitlines()) >= 4):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    psutil.wait_procs(family, timeout=60)

    status, out, error = train(workplace, *overrides, "--resume", "auto")
    assert status == 0, error
    assert "going on after step" in out
    assert timeless(run) == timeless(whole) and len(timeless(run)) == STEPS
    for step in range(STEPS):
        ours, theirs = (parquet.read_table(r / "rollouts" / f"step_{step}.parquet") for r in (run, whole))
        assert ours.equals(theirs)
    last = f"checkpoints/step_{STEPS}"
    sums = [[line for line in (r / last / "SHA256SUMS").read_text().splitlines() if ".safetensors" in line] for r in (run, whole)]
    assert sums[0] == sums[1] and len(sums[0]) == 6
    summary = json.loads(out.splitlines()[-1])
    assert summary["accuracy_before"] == json.loads((whole / "evaluations/step_0.json").read_text())["accuracy"]["mean"]
    steps = history(read_ledger(run / "ledger.jsonl"))
    assert [steps[step]["first"] for step in range(STEPS)] == [4 * step for step in range(STEPS)]

    status, out, error = train(workplace, *overrides, "--resume", "auto")
    assert status == 0 and "is complete" in out, error


def test_a_branch_at_another_layout_has_the_same_weights_and_goes_on_with_the_same_prompts(workplace, whole):
    """TP2 → PP2: what the ranks hold is what the checkpoint says, tensor for tensor; the prompts after it are those that were next."""
    layout = ["trainer.tensor_parallel=1", "trainer.pipeline_parallel=2"]
    point = whole / "checkpoints" / "step_4"
    status, _, error = train(workplace, "name=moved", "steps=4", *layout, "--resume", str(point))
    assert status == 0, error
    exported = tensor_hashes(workplace / "runs/moved/exports/step_4/model.safetensors")
    assert exported == read_manifest(point).tensors and len(exported) == 26

    status, _, error = train(
        workplace, "name=doubled", "steps=5", "trainer.tensor_parallel=1", "trainer.data_parallel=2", f"resume={point}"
    )
    assert status == 0, error
    ours, theirs = (parquet.read_table(r / "rollouts/step_4.parquet", columns=["prompt_id"]) for r in (workplace / "runs/doubled", whole))
    assert ours.equals(theirs)
    # The moments came along too: the step is that of the undisturbed run, but for rounding.
    (step,) = metrics(workplace / "runs/doubled")
    for name in ("train/gradient_norm", "train/loss", "train/kl", "train/weight_distance"):
        assert step[name] == pytest.approx(metrics(whole)[4][name], rel=2e-3, abs=1e-6), name


def test_a_fresh_engine_on_the_export_says_what_the_live_one_said(workplace, whole, ray_cluster):
    """Greedy answers of the live engines after the last transfer, kept by a run whose evaluation is greedy, token for token."""
    status, _, error = train(
        workplace, "name=greedy", f"steps={STEPS}", "evaluation.temperature=0", "--resume", str(whole / "checkpoints" / f"step_{STEPS}")
    )
    assert status == 0, error
    run = workplace / "runs" / "greedy"
    manifest = read_manifest(whole / "checkpoints" / f"step_{STEPS}")
    assert tensor_hashes(run / f"exports/step_{STEPS}/model.safetensors") == manifest.tensors
    assert tensor_hashes(whole / f"exports/step_{STEPS}/model.safetensors") == manifest.tensors
    said = [a["text"] for a in json.loads((run / f"evaluations/step_{STEPS}.json").read_text())["answers"]][::2]

    from megatron_aspo.config import load_config
    from megatron_aspo.data.tasks import build_task
    from megatron_aspo.data.tokenizer import load_tokenizer

    export = run / "exports" / f"step_{STEPS}"
    tokenizer = load_tokenizer(export)
    config = load_config(run / "config.yaml", [f"data.path={workplace}/train.jsonl", f"data.eval_path={workplace}/held_out.jsonl"])
    prompts = _held_out(build_task, config, tokenizer, workplace)
    pool = EnginePool(str(export), RolloutOptions(dtype="float32", threads=1), max_model_len=config.max_model_len)
    try:
        pool.start()
        requests = [Request(p.id, p.token_ids, seed=0, max_tokens=16, temperature=0.0) for p in prompts]
        answers = tokenizer.batch_decode([g.token_ids for g in pool.generate(requests)], skip_special_tokens=True)
    finally:
        pool.shutdown()
    assert answers == said and len(set(answers)) > 1


def _held_out(build_task, config, tokenizer, workplace):
    import sys

    sys.path.append(str(workplace))
    try:
        return build_task(config.task, config.data, tokenizer, config.seed).held_out()
    finally:
        sys.path.remove(str(workplace))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["seed=1"], "seed was 0, the recipe says 1"),
        (["data.path=held_out.jsonl"], "the prompts or their tokens are others"),
        (["model=qwen3"], "holds another model"),
    ],
)
def test_what_would_lose_prompts_or_mix_models_is_refused_before_anything_starts(workplace, whole, change, message):
    status, _, error = train(workplace, "name=other_data", *change, "--resume", str(whole / "checkpoints" / "step_2"))
    assert status == 2 and message in error.splitlines()[-1]
    assert not (workplace / "runs" / "other_data").exists()
