"""`megatron-aspo plan`: its numbers against files on the disk and Megatron's numbering of ranks, and its refusals."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from megatron_aspo.cli import main
from megatron_aspo.common.errors import UserError
from megatron_aspo.config import load_config
from megatron_aspo.runtime.plan import Plan, make_plan
from tests.in_process import run_main
from tests.models import save_tiny

RECIPE = {
    "model": "model",
    "task": "single_digit_addition",
    "algorithm": {"mini_batch_prompts": 4, "kl_coef": 0.01},
    "trainer": {"dtype": "bfloat16", "micro_batch_tokens": 512},
    "rollout": {"prompts_per_step": 8, "responses_per_prompt": 4, "max_response_tokens": 64, "max_running_requests": 8},
    "data": {"max_prompt_tokens": 36},
}


@pytest.fixture
def directory(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_tiny("qwen2", tmp_path / "model", tied=False)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def plan(*overrides: str, device: str = "cpu") -> Plan:
    return make_plan(load_config(Path("recipe.yaml"), overrides), device)


def elements(directory: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(directory / "model.safetensors").values())


def test_memory_and_traffic_match_the_files_on_disk(directory):
    count = elements(directory / "model")
    (rank,) = plan().ranks
    # Adam keeps two float32 moments and, beside bfloat16 weights, float32 ones.
    assert (rank.weights, rank.reference, rank.gradients, rank.optimizer) == (2 * count, 2 * count, 4 * count, 12 * count)
    (rank,) = plan("trainer.dtype=float32", "algorithm.kl_coef=0").ranks
    assert (rank.weights, rank.reference, rank.gradients, rank.optimizer) == (4 * count, 0, 4 * count, 8 * count)
    stages = plan("trainer.pipeline_parallel=2").ranks
    assert sum(rank.weights for rank in stages) == 2 * count
    sharded = plan("trainer.data_parallel=2", "trainer.distributed_optimizer=true").ranks[0]
    assert (sharded.weights, sharded.optimizer) == (2 * count, 6 * count)
    # Gloo sums gradients in a copy of them.
    assert (sharded.reduction, rank.reduction) == (4 * count, 0)
    assert plan("trainer.data_parallel=2", device="cuda").ranks[0].reduction == 0
    assert plan("rollout.engines=2").sync[0] == 2 * 2 * count
    assert plan("rollout.dtype=float32").worker.weights == 4 * count
    assert plan("checkpoint.every=1").ranks[0].checkpoint == 14 * count


def test_temporary_tensors_are_counted_with_the_fragmentation_of_the_heap(directory):
    (on_cpu,), (on_gpu,) = plan().ranks, plan(device="cuda").ranks
    assert on_cpu.activations == pytest.approx(1.75 * on_gpu.activations, rel=1e-6)


def test_nodes_are_shown_with_their_ranks_and_engines_and_groups_that_would_span_nodes_are_refused(directory):
    words = ["trainer.data_parallel=4", "rollout.engines=4"]
    shown = run_main(main, "plan", "recipe.yaml", *words, "--nodes", "2", cwd=directory).stdout
    assert "  node 0           ranks 0 to 3, no engines\n  node 1           no ranks, engines 0 to 3\n" in shown
    found = run_main(main, "plan", "recipe.yaml", *words, "--nodes", "4", "--json", cwd=directory).stdout
    assert [len(node["ranks"]) for node in json.loads(found)["nodes"]] == [2, 2, 0, 0]
    assert [node["engines"] for node in json.loads(found)["nodes"]] == [[], [], [0, 1], [2, 3]]
    refused = run_main(main, "plan", "recipe.yaml", *words, "--nodes", "3", cwd=directory)
    assert refused.returncode == 2 and "8 devices are no multiple of --nodes 3" in refused.stderr


def test_experts_are_sharded_over_their_own_replicas(directory):
    save_tiny("qwen3_moe", directory / "model")
    tensors = load_file(directory / "model" / "model.safetensors")
    experts = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
    others = elements(directory / "model") - experts
    rank = plan("trainer.data_parallel=4", "trainer.expert_parallel=2", "trainer.distributed_optimizer=true").ranks[0]
    assert rank.weights == 2 * (others + experts // 2)
    assert rank.optimizer == 12 * (others // 4 + experts // 2 // 2)


def test_groups_have_megatrons_rank_numbers(directory):
    found = plan("trainer.tensor_parallel=2", "trainer.pipeline_parallel=2", "trainer.data_parallel=2").groups
    assert found == {
        "tensor": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "data": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "pipeline": [[0, 4], [1, 5], [2, 6], [3, 7]],
    }
    save_tiny("qwen3_moe", directory / "model")
    assert plan("trainer.data_parallel=4", "trainer.expert_parallel=2").groups["expert"] == [[0, 1], [2, 3]]


def test_a_micro_batch_is_as_large_as_allowed_but_not_larger_than_the_batch(directory):
    assert (plan().load.tokens, plan().load.micro_batches) == (512, 4)  # 4 prompts × 4 responses × 100 tokens
    assert plan("trainer.micro_batch_tokens=1").load.tokens == 100
    assert plan("trainer.micro_batch_tokens=100000").load.tokens == 1600
    assert plan("trainer.data_parallel=4", "trainer.micro_batch_tokens=100000").load.tokens == 400


def test_offloaded_memory_is_not_counted_on_the_gpu(directory):
    kept, away = (
        plan(device="cuda").ranks[0],
        plan("trainer.offload_optimizer=true", "trainer.offload_reference=true", device="cuda").ranks[0],
    )
    assert (away.optimizer, away.reference) == (0, 0) and kept.optimizer and kept.reference
    assert plan("trainer.offload_optimizer=true").ranks[0].optimizer == kept.optimizer
    assert kept.pinned == 0 and away.total == kept.total - kept.optimizer - kept.reference
    state = kept.optimizer + kept.reference  # each of the two in pinned blocks, whose sizes are powers of two
    assert state <= away.pinned <= 1.1 * state + 2 * (256 << 20)


def test_fp8_copies_of_the_factors_of_matrix_products_are_counted(directory):
    tensors = load_file(directory / "model" / "model.safetensors")
    factors = sum(tensor.numel() for name, tensor in tensors.items() if "_proj.weight" in name)
    plain, fp8 = (plan(f"trainer.fp8={name}", device="cuda").ranks[0] for name in ("none", "hybrid"))
    # One byte each, in training also for the transposed copy that backward multiplies by.
    assert (fp8.weights - plain.weights, fp8.reference - plain.reference) == (2 * factors, factors)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.tensor_parallel=3"], "trainer.tensor_parallel=3 does not divide .*; choose one of"),
        (["trainer.pipeline_parallel=3"], "trainer.pipeline_parallel=3 does not divide"),
        (["trainer.pipeline_parallel=2", "trainer.virtual_pipeline=7"], "their product must be one of"),
        (["trainer.expert_parallel=2"], "the model has no experts; leave them out"),
        (["trainer.expert_tensor_parallel=1"], "the model has no experts; leave it out"),
        (["trainer.offload_reference=true", "algorithm.kl_coef=0"], "set one of them"),
        (["trainer.fp8=hybrid", "trainer.dtype=float32"], "trainer.fp8=hybrid goes with trainer.dtype=bfloat16"),
        (["trainer.distributed_optimizer=true"], "set trainer.data_parallel above 1"),
        (["trainer.sequence_parallel=true"], "set trainer.tensor_parallel above 1"),
        (["rollout.tensor_parallel=3"], "rollout.tensor_parallel=3 does not divide"),
        (["rollout.expert_parallel=true"], "this model has no experts; set it to false"),
        (["rollout.max_response_tokens=100000"], "more than the model's .* positions; lower one of them"),
        (["rollout.kv_cache_gib=0.00001"], r"holds the keys and values of \d+ tokens, fewer than the 100 .*; raise it to 0.1"),
        (["rollout.engines=2", "placement=colocated"], "lower rollout.engines or rollout.tensor_parallel, or set placement=split"),
        (["rollout.sleep_level=1"], "rollout.sleep_level=1 has no effect with placement=split"),
        (["rollout.kv_cache_gib=100000"], "need .* GB on this machine, which has .*; lower"),
        (["model=elsewhere/nowhere/really"], "there is no such local directory"),
        (["trainer.tensor_paralel=2"], "tensor_parallel"),
        (["task="], "task is empty; choose one of"),
        (["resume=nowhere"], "there is no checkpoint"),
        (["trainer.layer_spec=transformer_engine"], "needs a CUDA device"),
        (["trainer.fp8=hybrid"], "needs a GPU of compute capability"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_recipe_that_cannot_work_is_refused_with_the_cure(directory, monkeypatch, overrides, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        plan(*overrides)


def test_a_run_directory_that_exists_is_mentioned(directory, capsys):
    assert not plan().notes
    with pytest.raises(SystemExit) as ended:
        main(["plan", "recipe.yaml", "run_dir=.", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and printed["run_directory_exists"] and "train will refuse it; choose another name" in printed["notes"][0]
    with pytest.raises(SystemExit):
        main(["plan", "recipe.yaml", "run_dir=."])
    assert f"note: run directory {directory} exists" in capsys.readouterr().out


def test_a_directory_with_only_a_config_is_planned_and_that_is_mentioned(directory):
    (directory / "model" / "model.safetensors").unlink()
    (note,) = plan().notes
    assert "holds no weights: only its config.json was checked" in note
    (directory / "model" / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        plan()


def test_the_command_prints_the_plan_and_starts_nothing(directory, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "recipe.yaml", "trainer.pipeline_parallel=2", "--json", "--device", "cpu"])
    printed = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and len(printed["ranks"]) == 2 and printed["groups"] == {"pipeline": [[0, 1]]}
    with pytest.raises(SystemExit) as ended:
        main(["train", "recipe.yaml", "--dry-run", "trainer.tensor_parallel=2"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "tensor         1 × 2: [0 1]" in text and "engine worker" in text
    with pytest.raises(SystemExit) as ended:
        main(["plan", "recipe.yaml", "rollout.tensor_parallel=3"])
    assert ended.value.code == 2 and "does not divide" in capsys.readouterr().err
    assert sorted(path.name for path in directory.iterdir()) == ["model", "recipe.yaml"]
