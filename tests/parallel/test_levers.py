"""Options that save memory change no result: held to plain PyTorch in float64, on real Megatron-Core processes."""

import pytest

from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.trainer.options import TrainerOptions
from megatron_aspo.trainer.settings import RankSettings
from tests.models import SIZES
from tests.parallel import workloads
from tests.parallel.test_one_step import OPTIMIZER, Case, make_case, relative_error, run, truth

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
    """The case of a model by its name; each is made once."""
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


def _settings(case: Case, **trainer) -> RankSettings:
    options = TrainerOptions(**{"dtype": "float32", "micro_batch_tokens": 10_000, "logprob_chunk_tokens": 16} | trainer)
    return RankSettings(case.directory, options, OPTIMIZER, AlgorithmOptions(), 1.0, 0, 2, 32)


def _kept(pools, case: Case, **layout) -> dict[str, int]:
    """Bytes of rank 0's activations by what is recomputed."""
    kept = {}
    for recompute in ("none", "selective", "full"):
        settings = _settings(case, recompute=recompute, **layout)
        kept[recompute] = pools(settings.sizes.world).run(workloads.kept_for_backward, settings, case.batch())[0]
    return kept


def test_recomputed_activations_are_not_kept(pools, cases):
    case = cases("qwen2 tied")
    layers, hidden, ffn, head = 4, SIZES["hidden_size"], SIZES["intermediate_size"], 32
    tokens = sum(len(prompt) + len(response) - 1 for prompt, response in zip(case.prompts, case.responses))
    kept = {name: size / tokens / 4 for name, size in _kept(pools, case).items()}
    # Of each layer: gate and up, the activated gate, its product with up; and what attention gives.
    assert kept["none"] - kept["selective"] >= layers * (4 * ffn + hidden)
    # The input of each layer; of the final norm input, scale and normalized input; rotary angles; the token's number, of 64 bits.
    assert kept["full"] == layers * hidden + (2 * hidden + 1) + head + 2


@pytest.mark.parametrize("layout", [SHARED, {"context_parallel": 2}], ids=["shared prompts", "CP2"])
def test_recomputing_more_keeps_less(pools, cases, layout):
    kept = _kept(pools, cases("qwen2 tied"), **layout)
    assert kept["full"] < 0.2 * kept["selective"] and kept["selective"] < 0.6 * kept["none"]
