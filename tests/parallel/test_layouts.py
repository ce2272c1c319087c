"""Every way of cutting a model and its batch takes the step of plain PyTorch in float64: sequence, interleaved pipeline, expert and context
parallelism and their products, on real Megatron-Core processes.
"""

import numpy as np
import pytest

from tests.parallel.test_one_step import Case, make_case, relative_error, run, truth

TP2_SP = {"tensor_parallel": 2, "sequence_parallel": True}
PP2_VPP2 = {"pipeline_parallel": 2, "virtual_pipeline": 2}
DP2_DISTRIBUTED = {"data_parallel": 2, "distributed_optimizer": True}
CASES = {
    "TP2 SP": ("qwen3 tied", TP2_SP),
    "TP2 SP PP2": ("qwen2 tied", {**TP2_SP, "pipeline_parallel": 2}),
    "TP2 SP shared prompts": ("qwen2 tied", {**TP2_SP, "shared_prompts": True}),
    "PP2 VPP2": ("qwen2 tied", PP2_VPP2),
    "PP2 VPP2 untied": ("llama untied", PP2_VPP2),
    "PP2 VPP2 DP2 distributed": ("qwen2 tied", {**PP2_VPP2, **DP2_DISTRIBUTED}),
    "PP2 VPP2 TP2 SP": ("qwen2 tied", {**PP2_VPP2, **TP2_SP}),
    "CP2": ("qwen2 tied", {"context_parallel": 2}),
    "CP2 shared prompts": ("qwen2 tied", {"context_parallel": 2, "shared_prompts": True}),
    "CP2 TP2 SP": ("qwen3 tied", {"context_parallel": 2, **TP2_SP}),
    "CP2 DP2 distributed": ("qwen2 tied", {"context_parallel": 2, **DP2_DISTRIBUTED}),
    "CP2 PP2": ("llama untied", {"context_parallel": 2, "pipeline_parallel": 2}),
    "CP2 PP2 VPP2": ("qwen2 tied", {"context_parallel": 2, **PP2_VPP2}),
    "EP1": ("qwen3_moe tied", {}),
    "EP2": ("qwen3_moe tied", {"expert_parallel": 2, "data_parallel": 2}),
    "EP2 mixtral": ("mixtral untied", {"expert_parallel": 2, "data_parallel": 2}),
    "EP2 TP2 SP ETP1": ("qwen3_moe tied", {"expert_parallel": 2, "expert_tensor_parallel": 1, **TP2_SP}),
    "TP2 SP ETP1": ("qwen3_moe tied", {"expert_tensor_parallel": 1, **TP2_SP}),
    "TP2 SP ETP2": ("qwen3_moe tied", {**TP2_SP}),
    "EP2 TP2 DP2 SP ETP2": ("qwen3_moe tied", {"expert_parallel": 2, "data_parallel": 2, **TP2_SP}),
    "EP2 DP4 distributed": ("qwen3_moe tied", {"expert_parallel": 2, "data_parallel": 4, "distributed_optimizer": True}),
    "EP2 CP2": ("qwen3_moe tied", {"expert_parallel": 2, "context_parallel": 2}),
    "EP2 DP2 PP2": ("qwen3_moe tied", {"expert_parallel": 2, "data_parallel": 2, "pipeline_parallel": 2}),
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


@pytest.mark.parametrize("name", CASES)
def test_one_step_equals_float64_pytorch(pools, cases, name):
    model, layout = CASES[name]
    true = truth(cases(model), "aspo")
    results = run(pools, cases(model), "aspo", **layout)
    ours, last = results[0], results[-1]
    assert np.abs(last["logprobs"] - true.logprobs).max() < 1e-5
    total, count = last["tally"]["loss"]
    assert abs(total / count - true.loss) / true.mean_token_loss <= 1e-5
    assert all(abs(result["norm"] / true.norm - 1) <= 1e-5 for result in results)
    if not layout.get("distributed_optimizer"):  # which leaves each rank only its share of the gradient
        assert relative_error(ours["gradients"], true.gradients) <= 1e-5
    assert relative_error(ours["weights"], true.weights) <= 1e-5
