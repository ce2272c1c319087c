"""The optimizer's state by parameter: complete, correct, and sufficient to resume from bit for bit."""

import math

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from megatron_aspo.hf.model import read_model
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
from megatron_aspo.trainer.settings import RankSettings
from megatron_aspo.weights.families import replica_layouts
from tests.models import save_tiny
from tests.parallel import state_workloads
from tests.parallel.test_update import VOCAB, batch

pytestmark = pytest.mark.long

CASES = {
    "float32 TP2": {"tensor_parallel": 2},
    "float32 PP2 tied": {"pipeline_parallel": 2},
    "float32 DP2": {"data_parallel": 2},
    "float32 DP2 distributed": {"data_parallel": 2, "distributed_optimizer": True},
    "bfloat16 TP2": {"dtype": "bfloat16", "tensor_parallel": 2},
    "bfloat16 PP2 untied": {"dtype": "bfloat16", "pipeline_parallel": 2},
    "bfloat16 DP2 distributed": {"dtype": "bfloat16", "data_parallel": 2, "distributed_optimizer": True},
    "bfloat16 PP2 tied DP2 distributed": {"dtype": "bfloat16", "pipeline_parallel": 2, "data_parallel": 2, "distributed_optimizer": True},
}
# No clipping: the recorded gradients are those that Adam sees. Small betas and a large rate make a wrong moment or count visible.
OPTIMIZER = OptimizerOptions(lr=1e-3, warmup_steps=1, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1, clip_grad=0.0)
UPDATES = 2
"""In each rollout step: five groups in mini-batches of three."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    paths = {}
    for tied in (True, False):
        paths[tied] = tmp_path_factory.mktemp("model")
        save_tiny("qwen2", paths[tied], tied=tied, vocab_size=VOCAB)
    return paths


@pytest.fixture(scope="module", params=CASES)
def run(request, pools, directories):
    """Return (settings, every rank's results) of one layout."""
    settings = RankSettings(
        directories["untied" not in request.param],
        TrainerOptions(**{"dtype": "float32", "micro_batch_tokens": 60, "layer_spec": "local"} | CASES[request.param]),
        OPTIMIZER,
        AlgorithmOptions(epochs=1, mini_batch_prompts=3),
        temperature=0.9,
        seed=0,
        responses_per_prompt=3,
        max_response_tokens=12,
    )
    return settings, pools(settings.sizes.world).run(state_workloads.interrupted, settings, batch())


def test_the_slabs_hold_every_parameter_once_per_replica_or_once_over_all_replicas(run):
    settings, results = run
    sizes, hf = settings.sizes, read_model(settings.model_directory)
    layouts = replica_layouts(hf.architecture, hf.dims, sizes, "local")
    for rank in (rank for rank in range(sizes.world) if sizes.coordinates(rank).data == 0):
        replicas = [results[rank + data * sizes.tensor]["kept"]["ranges"] for data in range(sizes.data)]
        for name, shape in layouts[rank].parameter_shapes.items():
            ranges = [replica.get(name, (0, 0)) for replica in replicas]
            if settings.trainer.distributed_optimizer:
                edges = [0, *(edge for start, stop in sorted(r for r in ranges if r[1]) for edge in (start, stop)), math.prod(shape)]
                assert all(stop == start for stop, start in zip(edges[::2], edges[1::2], strict=True)), (name, ranges)
            else:
                assert ranges == [(0, math.prod(shape))] * sizes.data, name
        assert set().union(*replicas) == layouts[rank].parameter_shapes.keys()
    if settings.trainer.distributed_optimizer:  # some shards begin or end inside a parameter
        assert any(start > 0 for result in results for start, _ in result["kept"]["ranges"].values())


def test_main_weights_start_with_the_unrounded_values_of_the_files(run):
    settings, results = run
    sizes, hf = settings.sizes, read_model(settings.model_directory)
    files = load_file(settings.model_directory / "model.safetensors")
    for rank, layout in replica_layouts(hf.architecture, hf.dims, sizes, "local").items():
        expected = {name: np.zeros(shape, np.float32) for name, shape in layout.parameter_shapes.items()}
        for piece in layout.pieces:
            values = files[piece.tensor][tuple(slice(*edge) for edge in piece.box)]
            expected[piece.parameter][tuple(slice(*edge) for edge in piece.local)] = values
        for data in range(sizes.data):
            first = results[rank + data * sizes.tensor]["first"]
            for name, (start, stop) in first["ranges"].items():
                begun = first["master"].get(name, first["weights"][name][start:stop])
                assert np.array_equal(begun, expected[name].reshape(-1)[start:stop]), (rank, data, name)


def test_main_weights_share_the_models_memory_in_float32_and_round_to_it_in_bfloat16(run):
    settings, results = run
    for rank, result in enumerate(results):
        kept = result["kept"]
        if settings.trainer.dtype == "float32":
            assert not kept["master"]
            continue
        assert kept["master"].keys() == kept["ranges"].keys()
        below_half_a_unit = 2.0**-8  # of bfloat16's 8 bits
        for name, (start, stop) in kept["ranges"].items():
            model, main = kept["weights"][name][start:stop], kept["master"][name]
            assert np.all(np.abs(model - main) <= below_half_a_unit * np.abs(main)), (rank, name)
            assert stop - start < 64 or not np.array_equal(model, main), (rank, name)


def test_moments_and_weights_equal_adam_in_float64(run):
    """The closed form of AdamW over the gradients of each update."""
    settings, results = run
    for rank, result in enumerate(results):
        assert result["first"]["updates"] == 0 and result["kept"]["updates"] == len(result["gradients"]) == UPDATES
        for name, (start, stop) in result["kept"]["ranges"].items():
            first, kept = result["first"], result["kept"]
            assert not first["exp_avg"][name].any() and not first["exp_avg_sq"][name].any()
            gradients = [step[name][start:stop] for step in result["gradients"]]
            assert all(gradient.any() for gradient in gradients), (rank, name)
            weight = first["master"].get(name, first["weights"][name][start:stop])
            decay = 0.0 if name.endswith("bias") or "norm" in name else settings.optimizer.weight_decay
            weight, mean, square = adam(weight, gradients, result["learning_rate"], decay, settings.optimizer)
            for kind, expected in (("exp_avg", mean), ("exp_avg_sq", square)):
                assert np.allclose(kept[kind][name], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max()), (rank, kind, name)
            main = kept["master"].get(name, kept["weights"][name][start:stop])
            assert np.allclose(main, weight, rtol=1e-6, atol=1e-8), (rank, name)


def adam(weight, gradients, rate: float, decay: float, options: OptimizerOptions):
    """Return weight, first and second moment by Loshchilov and Hutter, Decoupled Weight Decay Regularization, algorithm 2; float64."""
    mean = square = np.zeros_like(weight)
    for count, gradient in enumerate(gradients, start=1):
        mean = options.beta1 * mean + (1 - options.beta1) * gradient
        square = options.beta2 * square + (1 - options.beta2) * gradient**2
        step = mean / (1 - options.beta1**count) / (np.sqrt(square / (1 - options.beta2**count)) + options.eps)
        weight = weight - rate * decay * weight - rate * step
    return weight, mean, square


def test_reading_the_state_changes_nothing_before_the_first_update_or_later(run):
    for result in run[1]:
        assert result["by reading"] == []


def test_a_new_trainer_resumes_from_a_copied_state_bit_for_bit(run):
    for result in run[1]:
        assert result["by copying"] == [] and result["by restoring"] == [] and result["draws"]
        moved = {name.partition(" ")[2] for name in result["moved"] if name.startswith("exp_avg ")}
        assert moved == result["kept"]["ranges"].keys()  # the step in between was not empty


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
def test_a_group_may_mix_float32_and_bfloat16_parameters(pools, distributed):
    """Megatron's shard index is wrong there; by shape and value each main weight must be its own parameter's."""
    slabs = [result for rank in pools(2).run(state_workloads.mixed_dtypes, distributed) for result in rank]
    assert all(correct for _, _, _, correct in slabs)
    assert sum(stop - start for _, start, stop, _ in slabs) == (6 + 35 + 32) * (1 if distributed else 2)


@pytest.fixture
def linear():
    """Return a module and two optimizers over it in Megatron's wrapper: torch's Adam, and a stand-in for a fused one."""
    from megatron_aspo.trainer import megatron_adapter

    megatron_adapter.prepare()  # before any other import of Megatron-Core
    from megatron.core.optimizer import FP32Optimizer, OptimizerConfig

    class FusedAdam(torch.optim.Optimizer):
        """Transformer Engine's and apex's Adam run on GPUs only. Like them it counts in the group, from the first step on."""

        def __init__(self, groups):
            super().__init__(groups, {})

        def step(self):
            for group in self.param_groups:
                if group["params"]:
                    group["step"] = group["step"] + 1 if "step" in group else 1
                for parameter in group["params"]:
                    if not self.state[parameter]:
                        self.state[parameter] = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}

    module = torch.nn.Linear(3, 2)
    groups = [{"params": [module.weight]}, {"params": [module.bias]}, {"params": []}]
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    config = OptimizerConfig(optimizer="adam", lr=0.1)
    return module, [FP32Optimizer(adam([dict(g) for g in groups]), config, None) for adam in (torch.optim.AdamW, FusedAdam)]


def test_fused_adam_and_torchs_adam_count_updates_alike(linear):
    from megatron_aspo.trainer.optimizer_state import optimizer_slabs, set_updates, updates

    module, optimizers = linear
    for optimizer in optimizers:
        assert updates(optimizer) == 0
        slabs = optimizer_slabs(module, optimizer)
        assert {name: (slab.start, slab.stop, slab.master) for name, slab in slabs.items()} == {
            "weight": (0, 6, None),
            "bias": (0, 2, None),
        }
        assert updates(optimizer) == 0
        for expected in (1, 2):
            optimizer.optimizer.step()
            assert updates(optimizer) == expected
        set_updates(optimizer, 40)
        assert updates(optimizer) == 40
        optimizer.optimizer.step()
        assert updates(optimizer) == 41
        for name, slab in slabs.items():  # still the optimizer's own tensors
            slab.exp_avg.fill_(7.0)
            assert torch.all(optimizer.optimizer.state[module.get_parameter(name)]["exp_avg"] == 7.0)


def test_the_count_can_be_set_before_the_first_step(linear):
    from megatron_aspo.trainer.optimizer_state import set_updates, updates

    for optimizer in linear[1]:
        set_updates(optimizer, 5)
        optimizer.optimizer.step()
        assert updates(optimizer) == 6


def test_parameters_that_disagree_on_the_count_are_an_error(linear):
    from megatron_aspo.trainer.optimizer_state import updates

    module, (adam, fused) = linear
    for optimizer in (adam, fused):
        optimizer.optimizer.step()
    adam.optimizer.state[module.bias]["step"] += 1
    fused.optimizer.param_groups[1]["step"] = 3
    with pytest.raises(ValueError, match=r"different numbers of updates: \[1, 2\]"):
        updates(adam)
    with pytest.raises(ValueError, match=r"different numbers of updates: \[1, 3\]"):
        updates(fused)


def test_the_optimizer_of_another_model_is_refused(linear):
    from megatron_aspo.trainer.optimizer_state import optimizer_slabs

    with pytest.raises(ValueError, match=r"shape \[2, 3\] that is none of the model's"):
        optimizer_slabs(torch.nn.Linear(3, 2), linear[1][0])
