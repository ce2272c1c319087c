"""A stopped run resumes: bit for bit at the same layout, with the same prompts at another, and never from an incomplete checkpoint."""

import hashlib
import json
import re
from pathlib import Path

import psutil
import pyarrow.parquet as parquet
import pytest
from safetensors import safe_open

from megatron_aspo.checkpoint.manifest import read_manifest
from megatron_aspo.data.tokenizer import load_tokenizer
from megatron_aspo.rollout.engine import Request
from megatron_aspo.rollout.options import RolloutOptions
from megatron_aspo.rollout.pool import EnginePool
from megatron_aspo.runtime.ledger import history, read_ledger
from tests.e2e.workplace import STEPS, WHOLE, metrics, start, timeless, train, train_here, wait_for

pytestmark = pytest.mark.long
KILLED = ["name=killed", *WHOLE, "--resume", "auto"]


def tensor_hashes(directory: Path) -> dict[str, str]:
    with safe_open(directory / "model.safetensors", "numpy") as handle:
        return {name: hashlib.sha256(handle.get_tensor(name).tobytes()).hexdigest() for name in handle.keys()}  # noqa: SIM118


def tensor_files(run: Path, step: int = STEPS) -> list[str]:
    """Return SHA-256 and name of weights, optimizer and random states of every rank after this step."""
    sums = (run / "checkpoints" / f"step_{step}" / "SHA256SUMS").read_text().splitlines()
    return [line for line in sums if line.endswith(".safetensors")]


def test_a_training_rank_killed_while_it_saves_ends_the_run_and_leaves_only_complete_checkpoints(workplace):
    """SIGKILL on one of two ranks at the moment a checkpoint begins. The next test resumes this run."""
    process = start(workplace, *KILLED)
    run = workplace / "runs" / "killed"
    wait_for(process, lambda: any((run / "checkpoints").glob("step_2.unfinished-*")), poll_s=0.002)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "TrainerActor" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    ranks[1].kill()
    _, error = process.communicate(timeout=120)
    assert process.returncode not in (0, -9) and "training rank" in error, error
    assert "Traceback" not in error
    left = sorted((run / "checkpoints").iterdir())
    assert left and all(re.fullmatch(r"step_\d", path.name) for path in left), left
    for checkpoint in left:
        read_manifest(checkpoint)
    assert not (run / "exports").exists()


def test_a_killed_run_resumes_without_a_difference(workplace, whole):
    """SIGKILL on the driver once three steps are done, then `--resume auto`: the same metrics, rollouts, weights and optimizer.

    The run is the one in which the test above killed a rank; when it runs alone, this test starts it.
    """
    process = start(workplace, *KILLED)
    run = workplace / "runs" / "killed"
    wait_for(process, lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_bytes().splitlines()) >= 3)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    psutil.wait_procs(family, timeout=60)

    status, out, error = train(workplace, *KILLED)
    assert status == 0, error
    assert "going on after step" in out
    assert timeless(run) == timeless(whole) and len(timeless(run)) == STEPS
    for step in range(STEPS):
        ours, theirs = (parquet.read_table(r / "rollouts" / f"step_{step}.parquet") for r in (run, whole))
        assert ours.equals(theirs) and ours.num_rows == 16
    assert tensor_files(run) == tensor_files(whole) and len(tensor_files(run)) == 6
    assert tensor_hashes(run / "exports" / f"step_{STEPS}") == tensor_hashes(whole / "exports" / f"step_{STEPS}")
    summary = json.loads(out.splitlines()[-1])
    assert summary["accuracy_before"] == json.loads((whole / "evaluations/step_0.json").read_text())["accuracy"]["mean"]
    steps = history(read_ledger(run / "ledger.jsonl"))
    assert [steps[step]["first"] for step in range(STEPS)] == [4 * step for step in range(STEPS)]
    sources = parquet.read_table(run / f"rollouts/step_{STEPS - 1}.parquet", columns=["data_source"])["data_source"].to_pylist()
    assert sorted(sources[::4]) == ["dataset", "dataset", "words", "words"]  # a mixture of JSONL and Parquet

    status, out, error = train_here(workplace, *KILLED)
    assert status == 0 and "is complete" in out, error


def test_ranks_checkpoint_export_and_a_fresh_engine_have_the_same_weights(workplace, whole, ray_cluster):
    """TP2 → PP2: the checkpoint equals the ranks' weights, tensor for tensor; an engine that loads the export answers like the live ones,
    to which the weights were sent.
    """
    point = whole / "checkpoints" / "step_1"
    words = ["name=moved", "steps=1", "trainer.tensor_parallel=1", "trainer.pipeline_parallel=2", "evaluation.temperature=0"]
    status, _, error = train(workplace, *words, "rollout.engines=1", "--resume", str(point))
    assert status == 0, error
    run = workplace / "runs" / "moved"
    export = run / "exports" / "step_1"
    tensors = read_manifest(point).tensors
    assert tensor_hashes(export) == tensors and len(tensors) == 26
    assert tensor_hashes(whole / "exports" / f"step_{STEPS}") == read_manifest(whole / "checkpoints" / f"step_{STEPS}").tensors != tensors
    card = (export / "README.md").read_text()
    assert all(f"{digest}  {name}" in card for name, digest in tensors.items())

    answers = json.loads((run / "evaluations" / "step_1.json").read_text())["answers"][::2]
    tokenizer = load_tokenizer(export)
    pool = EnginePool(str(export), RolloutOptions(dtype="float32", max_running_requests=4, threads=1), max_model_len=272)
    try:
        pool.start()
        prompts = [tokenizer.apply_chat_template([{"role": "user", "content": a["question"]}], add_generation_prompt=True) for a in answers]
        requests = [Request(a["question"], tuple(p["input_ids"]), seed=0, max_tokens=16, temperature=0.0) for a, p in zip(answers, prompts)]
        texts = tokenizer.batch_decode([g.token_ids for g in pool.generate(requests)], skip_special_tokens=True)
    finally:
        pool.shutdown()
    assert texts == [answer["text"] for answer in answers] and len(set(texts)) > 1


def test_a_branch_at_another_data_parallel_size_continues_with_the_same_prompts(workplace, whole):
    point = whole / "checkpoints" / f"step_{STEPS - 1}"
    words = ["name=doubled", f"steps={STEPS}", "trainer.tensor_parallel=1", "trainer.data_parallel=2", f"resume={point}"]
    status, _, error = train(workplace, *words)
    assert status == 0, error
    runs = (workplace / "runs" / "doubled", whole)
    ours, theirs = (parquet.read_table(run / f"rollouts/step_{STEPS - 1}.parquet", columns=["prompt_id"]) for run in runs)
    assert ours.equals(theirs)
    # The moments were loaded too: the step is that of the undisturbed run, up to rounding.
    (step,), (*_, undisturbed) = metrics(runs[0]), metrics(whole)
    for name in ("train/gradient_norm", "train/loss", "train/kl", "train/weight_distance"):
        assert step[name] == pytest.approx(undisturbed[name], rel=2e-3, abs=1e-6), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["seed=1"], "seed was 0, the recipe says 1"),
        (["data.path=[train.parquet, held_out.jsonl]"], "the prompts or their tokens are others"),
        (["data.weights=[1, 3]"], "the prompts or their tokens are others"),
        (["model=qwen3"], "is of another model"),
    ],
)
def test_a_resume_that_would_lose_prompts_or_mix_models_is_refused_before_anything_starts(workplace, whole, change, message):
    status, _, error = train_here(workplace, "name=other_data", *change, "--resume", str(whole / "checkpoints" / "step_2"))
    assert status == 2 and message in error.splitlines()[-1]
    assert not (workplace / "runs" / "other_data").exists()
