"""Checkpoints of real ranks: the saved state is loaded exactly, at any layout, while training continues."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_aspo.checkpoint.convert import convert, open_source
from megatron_aspo.checkpoint.manifest import read_manifest
from megatron_aspo.checkpoint.request import ATTEMPT
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
from megatron_aspo.trainer.settings import RankSettings
from tests.models import save_tiny
from tests.parallel import checkpoint_workloads
from tests.parallel.test_update import VOCAB, batch
from tests.unit.hf_shards import read_tensors

pytestmark = pytest.mark.long

LAYOUTS = {
    "TP2": {"tensor_parallel": 2},
    "PP2": {"pipeline_parallel": 2},
    "DP2": {"data_parallel": 2},
    "DP2 distributed": {"data_parallel": 2, "distributed_optimizer": True},
    "TP2 DP2 distributed": {"tensor_parallel": 2, "data_parallel": 2, "distributed_optimizer": True},
    "PP2 VPP2": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "CP2 TP2 SP distributed": {"context_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True, "distributed_optimizer": True},
    "one": {},
    "EP2 DP2 distributed": {"expert_parallel": 2, "data_parallel": 2, "distributed_optimizer": True},
    "EP2 TP2 SP ETP1": {"expert_parallel": 2, "expert_tensor_parallel": 1, "tensor_parallel": 2, "sequence_parallel": True},
}
"""Those with EP belong to a model with experts, all others to one without."""
CASES = [
    ("float32 TP2", "float32 PP2"),
    ("float32 TP2", "float32 TP2"),
    ("float32 PP2", "float32 DP2 distributed"),
    ("float32 DP2", "bfloat16 one"),
    ("bfloat16 TP2 DP2 distributed", "bfloat16 PP2"),
    ("bfloat16 PP2", "float32 DP2 distributed"),
    ("float32 PP2 VPP2", "float32 CP2 TP2 SP distributed"),
    ("float32 EP2 DP2 distributed", "float32 EP2 TP2 SP ETP1"),
]
"""(source, target) layouts and element types; each is on either side at least once."""
MORE = [
    ("float32 DP2 distributed", "float32 TP2"),
    ("bfloat16 TP2 DP2 distributed", "bfloat16 TP2 DP2 distributed"),
    ("float32 CP2 TP2 SP distributed", "float32 PP2 VPP2"),
    ("float32 EP2 TP2 SP ETP1", "float32 EP2 DP2 distributed"),
]
"""Mostly the reverse direction."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[bool, Path]:
    """Return {has experts: model directory}."""
    directories = {}
    for experts, family in ((False, "qwen2"), (True, "qwen3_moe")):
        directories[experts] = tmp_path_factory.mktemp("model")
        save_tiny(family, directories[experts], tied=True, vocab_size=VOCAB, num_hidden_layers=4)
    return directories


def settings(models, case: str) -> RankSettings:
    dtype, layout = case.split(" ", 1)
    return RankSettings(
        models["EP" in layout],
        TrainerOptions(dtype=dtype, micro_batch_tokens=60, layer_spec="local", **LAYOUTS[layout]),
        # Small betas and a large rate make a wrong moment or count of updates visible.
        OptimizerOptions(lr=1e-3, warmup_steps=1, beta1=0.8, beta2=0.9, eps=1e-3, clip_grad=0.0),
        AlgorithmOptions(epochs=1, mini_batch_prompts=3),
        temperature=0.9,
        seed=0,
        responses_per_prompt=3,
        max_response_tokens=12,
    )


@pytest.fixture(scope="module")
def saved(pools, models, tmp_path_factory):
    """Return case → (checkpoint, state that the ranks held); each is made once. Those of TP2 are written during the next step."""
    made = {}

    def get(case: str):
        if case not in made:
            run = tmp_path_factory.mktemp("run")
            (run / ATTEMPT).write_text("this one")
            target, ours = run / "checkpoints" / "step_1", settings(models, case)
            arguments = (ours, batch(), target, "this one", "TP2" in case)
            made[case] = target, pools(ours.sizes.world).run(checkpoint_workloads.save_amid_training, *arguments)[0]
        return made[case]

    return get


@pytest.mark.parametrize(("source", "target"), [*CASES, *(pytest.param(*case, marks=pytest.mark.nightly) for case in MORE)])
def test_weights_and_moments_cross_layouts_and_element_types(pools, models, saved, source, target):
    checkpoint, held = saved(source)
    ours = settings(models, target)
    results = pools(ours.sizes.world).run(checkpoint_workloads.load_and_continue, ours, batch(), checkpoint)
    loaded = results[0]["loaded"]
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        for name, expected in held["saved"][kind].items():
            assert np.array_equal(loaded[kind][name], expected), (kind, name)
            assert np.abs(expected).max() > 0 and (kind == "master" or np.ptp(expected) > 0), "the case shows nothing"
    assert results[0]["updates"] == read_manifest(checkpoint).training["updates"] == 2
    # It continues as the source would have; in bfloat16 the layouts round differently.
    rounding = 0 if source == target else 1e-2 if "bfloat16" not in source + target else 0.2
    for name, expected in held["after"]["master"].items():
        moved = np.abs(expected - held["saved"]["master"][name]).mean()
        error = np.abs(results[0]["after"]["master"][name] - expected).mean()
        assert error <= rounding * moved and moved > 0, (name, error / moved)


@pytest.mark.parametrize("case", ["float32 TP2", "bfloat16 TP2 DP2 distributed"])
def test_a_checkpoint_converts_to_the_weights_that_the_ranks_held(saved, case, tmp_path):
    """Also where it was written while training continued."""
    checkpoint, held = saved(case)
    source = open_source(checkpoint)
    assert source.dtype == case.split()[0]
    convert(source, tmp_path / "hf", to="huggingface", dtype="float32")
    convert(source, tmp_path / "torch_dist", to="torch_dist")
    convert(open_source(tmp_path / "torch_dist", "float32"), tmp_path / "by_way_of_torch_dist", to="huggingface", dtype="float32")
    for directory in ("hf", "by_way_of_torch_dist"):
        tensors = read_tensors(tmp_path / directory)
        assert tensors.keys() == held["saved"]["weights"].keys()
        for name, tensor in tensors.items():
            assert np.array_equal(tensor.numpy(), held["saved"]["weights"][name]), name


def test_a_process_that_was_replaced_cannot_finish_its_checkpoint(pools, models, tmp_path):
    (tmp_path / ATTEMPT).write_text("the successor")
    target = tmp_path / "checkpoints" / "step_1"
    ours = settings(models, "float32 TP2")
    reasons = pools(2).run(checkpoint_workloads.save_and_fail, ours, target, "the predecessor")
    assert all("another process has taken over" in reason for reason in reasons)
    assert not target.parent.exists()


def test_a_process_that_is_replaced_while_it_writes_does_not_publish_its_checkpoint(pools, models, tmp_path):
    (tmp_path / ATTEMPT).write_text("the predecessor")
    target = tmp_path / "checkpoints" / "step_1"
    work = checkpoint_workloads.save_while_another_takes_over
    reasons = pools(2).run(work, settings(models, "float32 TP2"), target, "the predecessor", "the successor")
    assert "was not made: another process has taken over this run" in reasons[0] and reasons[1] == ""
    assert list(target.parent.iterdir()) == []


def test_a_rank_that_cannot_write_ends_the_checkpoint_on_rank_0_too(pools, models, tmp_path):
    """Rank 1's file exists already: its error is the reason that rank 0 gives, and no file is left."""
    (tmp_path / ATTEMPT).write_text("this one")
    target = tmp_path / "checkpoints" / "step_1"
    blocked = target.with_name("step_1.unfinished-this one") / "model" / "rank_00001.safetensors"
    blocked.parent.mkdir(parents=True)
    blocked.write_bytes(b"")
    reasons = pools(2).run(checkpoint_workloads.save_and_fail, replace(settings(models, "float32 TP2"), seed=1), target, "this one")
    assert all(reasons) and "training rank 1" in reasons[0]
    assert not target.exists() and not list(target.parent.iterdir())
