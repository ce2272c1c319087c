"""Options that save memory change no result: compared with plain PyTorch in float64, on real Megatron-Core processes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_aspo.checkpoint.request import ATTEMPT
from megatron_aspo.common.errors import UserError
from megatron_aspo.data.batch import TrainBatch
from megatron_aspo.hf.model import read_model
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.trainer.device import select_device
from megatron_aspo.trainer.memory import kept_per_token
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
from megatron_aspo.trainer.settings import RankSettings
from megatron_aspo.weights.layout import ParallelSizes
from tests.models import SIZES
from tests.parallel import checkpoint_workloads, state_workloads, test_prepare, test_trainer_state, workloads
from tests.parallel.test_one_step import KL_COEF, OPTIMIZER, Case, make_case, relative_error, run, truth

pytestmark = pytest.mark.long

SHARED = {"shared_prompts": True}
TP2_SP = {"tensor_parallel": 2, "sequence_parallel": True}
PP2_VPP2 = {"pipeline_parallel": 2, "virtual_pipeline": 2}
RECOMPUTED = {
    "one process": ("qwen2 tied", {}),
    "shared prompts": ("qwen2 tied", SHARED),
    "TP2 SP PP2": ("qwen2 tied", {**TP2_SP, "pipeline_parallel": 2}),
    "PP2 VPP2 shared prompts": ("qwen2 tied", {**PP2_VPP2, **SHARED}),
    "CP2 TP2 SP shared prompts": ("qwen2 tied", {"context_parallel": 2, **TP2_SP, **SHARED}),
    "EP2 TP2 SP": ("qwen3_moe tied", {"expert_parallel": 2, "expert_tensor_parallel": 1, **TP2_SP}),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Return the case of a model by its name; each is made once."""
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            family, tying = name.split()
            # Samples at which no choice of experts is close.
            seed = 1 if family == "qwen3_moe" else 0
            made[name] = make_case(tmp_path_factory.mktemp("model"), family, tied=tying == "tied", seed=seed)
        return made[name]

    return get


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputed_activations_give_the_gradient_of_float64_pytorch(pools, cases, name, recompute):
    model, layout = RECOMPUTED[name]
    true = truth(cases(model), "aspo")
    ours = run(pools, cases(model), "aspo", recompute=recompute, **layout)[0]
    assert relative_error(ours["gradients"], true.gradients) <= 1e-5
    assert relative_error(ours["weights"], true.weights) <= 1e-5


def _rewarded(case: Case) -> TrainBatch:
    """Return the batch with an advantage in each group."""
    return replace(case.batch(), rewards=np.array([1.0, 0.0, 0.5, 0.0, 0.0, 2.0, 0.0, 0.7]))


def _settings(case: Case, **trainer) -> RankSettings:
    options = TrainerOptions(**{"dtype": "float32", "micro_batch_tokens": 10_000, "logprob_chunk_tokens": 16} | trainer)
    return RankSettings(case.directory, options, OPTIMIZER, AlgorithmOptions(), 1.0, 0, 2, 32)


def _kept(pools, case: Case, **layout) -> dict[str, int]:
    """Return the bytes of rank 0's activations by recomputation option."""
    kept = {}
    for recompute in ("none", "selective", "full"):
        settings = _settings(case, recompute=recompute, **layout)
        kept[recompute] = pools(settings.sizes.world).run(workloads.kept_for_backward, settings, case.batch())[0]
    return kept


def test_recomputed_activations_are_not_kept_for_backward(pools, cases):
    case = cases("qwen2 tied")
    layers, hidden, ffn, head = 4, SIZES["hidden_size"], SIZES["intermediate_size"], 32
    tokens = sum(len(prompt) + len(response) - 1 for prompt, response in zip(case.prompts, case.responses))
    kept = {name: size / tokens / 4 for name, size in _kept(pools, case).items()}
    # Per layer: gate, up and their product, which are all the tensors between the products of feed-forward; the attention output, with a
    # sum of exponentials for each head; and rotated keys (queries are kept unrotated). Less the kind of mask, one number per layer. One
    # table of cosines and sines for all layers, which recomputation keeps outside autograd.
    saved = layers * (3 * ffn + hidden + SIZES["num_attention_heads"] + SIZES["num_key_value_heads"] * head) + 2 * head
    assert kept["none"] - kept["selective"] == pytest.approx(saved - layers / tokens)
    # The input of each layer; input and scale of the final norm; the token's number, of 64 bits.
    assert kept["full"] == layers * hidden + (hidden + 1) + 2


@pytest.mark.parametrize("name", ["qwen2 tied", "qwen3 tied"])
def test_a_plan_counts_the_activations_that_are_kept(pools, cases, name):
    case = cases(name)
    layers, hidden, head = 4, SIZES["hidden_size"], 32
    tokens = sum(len(prompt) + len(response) - 1 for prompt, response in zip(case.prompts, case.responses))
    for recompute, size in _kept(pools, case).items():
        counted = kept_per_token(read_model(case.directory), TrainerOptions(recompute=recompute), 1, 1)
        table = 2 * head if recompute == "none" else 0  # otherwise autograd does not keep it
        assert layers * counted + (hidden + 1) + table + 2 == pytest.approx(size / tokens / 4, rel=1e-4), recompute


@pytest.mark.parametrize("layout", [SHARED, {"context_parallel": 2}], ids=["shared prompts", "CP2"])
def test_recomputing_more_keeps_less(pools, cases, layout):
    kept = _kept(pools, cases("qwen2 tied"), **layout)
    assert kept["full"] < 0.2 * kept["selective"] and kept["selective"] < 0.7 * kept["none"]


prepared = test_prepare.case
OFFLOADED = {"offload_optimizer": True, "offload_reference": True}
DISTRIBUTED = {"data_parallel": 2, "distributed_optimizer": True}


@pytest.mark.parametrize("layout", [{}, DISTRIBUTED, {"tensor_parallel": 2}], ids=["one process", "DP2 distributed", "TP2"])
def test_offloading_takes_the_step_of_float64_pytorch(pools, cases, layout):
    true = truth(cases("qwen2 tied"), "aspo")
    ours = run(pools, cases("qwen2 tied"), "aspo", **OFFLOADED, **layout)[0]
    assert relative_error(ours["weights"], true.weights) <= 1e-5


@pytest.mark.parametrize("layout", [{"dtype": "bfloat16", **DISTRIBUTED}, {"tensor_parallel": 2, **OFFLOADED}], ids=str)
def test_offloaded_and_reloaded_state_is_equal_bit_for_bit(pools, cases, layout):
    case = cases("qwen2 tied")
    options = TrainerOptions(**{"dtype": "float32", "micro_batch_tokens": 60} | layout)
    settings = RankSettings(case.directory, options, OPTIMIZER, AlgorithmOptions(mini_batch_prompts=2, kl_coef=KL_COEF), 1.0, 0, 2, 32)
    gone, stayed = (pools(2).run(workloads.train_and_park, settings, _rewarded(case), parked)[0] for parked in (True, False))
    assert gone.keys() == stayed.keys()
    for name, expected in stayed.items():
        np.testing.assert_array_equal(gone[name], expected)


@pytest.mark.parametrize("name", ["float32 TP2", "bfloat16 PP2 untied", "bfloat16 DP2 distributed"])
def test_an_optimizer_in_host_memory_equals_adam_in_float64_and_can_be_resumed_from(pools, cases, name):
    case = cases("qwen2 tied" if "untied" not in name else "llama untied")
    options = TrainerOptions(**{"dtype": "float32", "micro_batch_tokens": 60, "offload_optimizer": True} | test_trainer_state.CASES[name])
    algorithm = AlgorithmOptions(epochs=1, mini_batch_prompts=2)
    settings = RankSettings(case.directory, options, test_trainer_state.OPTIMIZER, algorithm, 0.9, 0, 2, 32)
    results = pools(settings.sizes.world).run(state_workloads.interrupted, settings, _rewarded(case))
    test_trainer_state.test_moments_and_weights_equal_adam_in_float64((settings, results))
    for result in results:
        assert result["moved"] and result["by reading"] == result["by copying"] == result["by restoring"] == []


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("offloaded", ["where it is saved", "where it is loaded"])
def test_checkpoints_hold_the_state_in_host_memory(pools, cases, tmp_path, offloaded, asynchronous):
    (tmp_path / ATTEMPT).write_text("this one")
    case, target = cases("qwen2 tied"), tmp_path / "checkpoints" / "step_1"
    algorithm = AlgorithmOptions(epochs=1, mini_batch_prompts=2)
    saving, loading = (
        RankSettings(case.directory, TrainerOptions(offload_optimizer=there, **DISTRIBUTED), OptimizerOptions(), algorithm, 1.0, 0, 2, 32)
        for there in (offloaded == "where it is saved", offloaded == "where it is loaded")
    )
    held = pools(2).run(checkpoint_workloads.save_amid_training, saving, _rewarded(case), target, "this one", asynchronous)[0]
    found = pools(2).run(checkpoint_workloads.load_and_continue, loading, _rewarded(case), target)[0]
    assert found["updates"] == 2
    for moment, ours in (("saved", "loaded"), ("after", "after")):
        for kind in checkpoint_workloads.KINDS:
            for name, expected in held[moment][kind].items():
                assert np.array_equal(found[ours][kind][name], expected) and np.abs(expected).max() > 0, (moment, kind, name)


@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("layout", [{"dtype": "bfloat16"}, {}, DISTRIBUTED, {**PP2_VPP2, "dtype": "bfloat16"}], ids=str)
def test_offloaded_state_is_on_the_device_only_while_in_use(pools, cases, layout, moved):
    case = cases("qwen2 tied")
    settings = replace(
        _settings(case, **(OFFLOADED if moved else {}), **layout), algorithm=AlgorithmOptions(epochs=1, mini_batch_prompts=4, kl_coef=0.01)
    )
    for result in pools(settings.sizes.world).run(workloads.offloaded, settings, _rewarded(case)):
        for name, uses in (("reference", 2), ("optimizer", 2)):
            found = result[name]
            assert found["home again"]
            assert found["moved"] == (found["tensors"] * uses if moved else 0)
            assert found["left"] == (0 if moved else found["tensors"] * uses), (name, found)
        elements = result["reference"]["bytes"] // (2 if layout.get("dtype") == "bfloat16" else 4)
        # Two moments, with bfloat16 main weights too; each rank has half of them if distributed.
        expected = elements * 4 * (3 if layout.get("dtype") == "bfloat16" else 2) // (2 if layout == DISTRIBUTED else 1)
        assert result["optimizer"]["bytes"] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("layout", [{"dtype": "bfloat16"}, {}, {"data_parallel": 2, "distributed_optimizer": True}], ids=str)
def test_offloaded_moments_are_never_on_the_device_together(pools, cases, layout):
    """The files are float32: bfloat16 training fills the main weights from them, which requires the whole state too."""
    settings = _settings(cases("qwen2 tied"), offload_optimizer=True, **layout)
    assert set(pools(settings.sizes.world).run(workloads.most_moments_on_the_device, settings)) == {1}


def test_reference_logprobs_are_those_of_the_original_weights_in_float64(pools, prepared):
    """In the second pass too, and with other weights in training."""
    ours = test_prepare.prepare(pools, prepared, AlgorithmOptions(), offload_reference=True)
    _, batch, current, original = prepared
    assert np.abs(ours["reference"] - original * batch.mask).max() < 1e-5
    assert np.abs(ours["old"] - current * batch.mask).max() < 1e-5 and np.abs(current - original)[batch.mask].max() > 0.1


@pytest.mark.parametrize("layout", [{}, {"data_parallel": 2}, {"tensor_parallel": 2}], ids=["one process", "DP2", "TP2"])
def test_gradients_accumulate_in_their_element_type(pools, cases, layout):
    """bfloat16 activations leave about 5 % of float64's gradient uncertain; the error of bfloat16 sums is bounded separately."""
    case, true = cases("qwen2 tied"), truth(cases("qwen2 tied"), "aspo").gradients
    gradients = {}
    for name in ("float32", "bfloat16"):
        options = TrainerOptions(dtype="bfloat16", gradient_dtype=name, micro_batch_tokens=64, **layout)
        settings = RankSettings(case.directory, options, OPTIMIZER, AlgorithmOptions(policy_loss="aspo", kl_coef=KL_COEF), 1.0, 0, 2, 32)
        results = pools(settings.sizes.world).run(workloads.one_step, settings, case.batch(), case.old, case.reference, case.advantages)
        ours = gradients[name] = results[0]["gradients"]
        assert all(result["gradient dtypes"] == {getattr(torch, name)} for result in results)
        for tensor, expected in true.items():
            assert np.linalg.norm(ours[tensor] - expected) <= 0.08 * np.linalg.norm(expected), (name, tensor)
    # Each of at most five sums rounds to 8 bits.
    assert 0 < relative_error(gradients["bfloat16"], gradients["float32"]) <= 5 * 2.0**-8
    for name, ours in gradients.items():
        kept = all(torch.equal(g.bfloat16().float(), g) for g in map(torch.from_numpy, ours.values()))
        assert kept == (name == "bfloat16")


def test_only_chosen_memory_options_are_named_at_the_start(pools, cases):
    plain = pools(1).run(workloads.described, _settings(cases("qwen2 tied"), dtype="bfloat16"))[0]
    levers = {"recompute": "full", "offload_optimizer": True, "offload_reference": True, "gradient_dtype": "bfloat16"}
    chosen = pools(1).run(workloads.described, _settings(cases("qwen2 tied"), dtype="bfloat16", **levers))[0]
    assert plain.keys() == {"device", "backend", "layout", "layer_spec", "optimizer", "dtype"}
    assert chosen == plain | {name: str(value).lower() for name, value in levers.items()}


def test_fp8_without_transformer_engine_ends_the_start(pools, cases):
    message = "trainer.fp8=hybrid needs trainer.layer_spec=transformer_engine, .* the layers here are local: set trainer.fp8=none"
    with pytest.raises(RuntimeError, match=message):
        pools(1).run(workloads.described, _settings(cases("qwen2 tied"), dtype="bfloat16", fp8="hybrid"))


@pytest.mark.parametrize("fp8", ["none", "e4m3", "hybrid"])
def test_fp8_reaches_transformer_engine(cases, fp8, monkeypatch):
    from megatron_aspo.trainer import megatron_adapter

    megatron_adapter.prepare()  # before any other import of Megatron-Core
    from megatron_aspo.trainer.layers import check_layers, packing_rules
    from megatron_aspo.trainer.model import transformer_config
    from megatron_aspo.trainer.parallel import ParallelState

    options = TrainerOptions(fp8=fp8, tensor_parallel=2, sequence_parallel=True)
    sizes = ParallelSizes(tensor=2)
    state = ParallelState(0, sizes, sizes.coordinates(0), None, None)
    model = read_model(cases("qwen2 tied").directory)
    config = transformer_config(model, state, select_device(), torch.bfloat16, "local", options)
    assert (config.fp8, config.fp8_recipe) == (None if fp8 == "none" else fp8, "tensorwise")
    assert packing_rules(options, sizes, state.at).total_tokens(37) == (38 if fp8 == "none" else 48)
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        if fp8 == "none" or capability == (9, 0):
            check_layers(options, "transformer_engine")
        else:
            with pytest.raises(
                UserError, match=f"trainer.fp8={fp8} needs a GPU of compute capability 8.9 or higher; this one has 8.0: set"
            ):
                check_layers(options, "transformer_engine")


@pytest.mark.parametrize(
    ("trainer", "algorithm", "model", "message"),
    [
        (
            {"offload_reference": True},
            {"kl_coef": 0.0},
            "qwen2 tied",
            "trainer.offload_reference=true has no effect with algorithm.kl_coef=0",
        ),
        ({"fp8": "e4m3"}, {}, "qwen3_moe tied", "trainer.fp8=e4m3 takes dense models only"),
        ({"fp8": "e4m3", "tensor_parallel": 32}, {}, "qwen2 tied", "at trainer.tensor_parallel=32 has one of 8; set trainer.fp8=none"),
    ],
)
def test_memory_options_that_have_no_effect_are_refused(cases, trainer, algorithm, model, message):
    dims = read_model(cases(model).directory).dims
    options = {name: value for name, value in trainer.items() if name != "tensor_parallel"}
    settings = RankSettings("", TrainerOptions(**options), OptimizerOptions(), AlgorithmOptions(**algorithm), 1.0, 0, 2, 8)
    if "tensor_parallel" in trainer:
        dims = replace(dims, heads=64, kv_heads=64)
        settings = replace(settings, trainer=TrainerOptions(**trainer))
    with pytest.raises(UserError) as caught:
        settings.check_model(dims)
    assert message in str(caught.value) and "\n" not in str(caught.value)
