"""Every layout of a model and its batch takes the step of plain PyTorch in float64: sequence, interleaved pipeline, expert and context
parallelism and their products, on real Megatron-Core processes.
"""

import numpy as np
import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.hf.model import read_model
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
from megatron_aspo.trainer.settings import RankSettings
from megatron_aspo.weights.families import layout as weight_layout
from tests.models import save_tiny
from tests.parallel import layout_cases, state_workloads, test_splitting, test_update, workloads
from tests.parallel.test_one_step import Case, relative_error, run, truth

pytestmark = pytest.mark.long

TP2_SP = {"tensor_parallel": 2, "sequence_parallel": True}
PP2_VPP2 = {"pipeline_parallel": 2, "virtual_pipeline": 2}
DP2_DISTRIBUTED = {"data_parallel": 2, "distributed_optimizer": True}
CASES = {case.name: case for case in layout_cases.read_table(layout_cases.SUITE)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the model and samples of a layout's case; each model is made once."""
    cases: dict[str, Case] = {}

    def get(case: layout_cases.LayoutCase) -> Case:
        if case.model not in cases:
            cases[case.model] = case.make(tmp_path_factory.mktemp("model"))
        return cases[case.model]

    return get


@pytest.mark.parametrize("name", CASES)
def test_one_step_equals_float64_pytorch(pools, made, name):
    case = CASES[name]
    results = run(pools, made(case), "aspo", **case.options)
    found = layout_cases.differences(results, truth(made(case), "aspo"))
    # With the distributed optimizer each rank has only its shard of the gradient.
    assert ("gradients" in found) == ("distributed_optimizer" not in case.options)
    assert max(found.values()) <= layout_cases.BAR, found


def test_the_table_has_no_duplicate_lines():
    names = [case.name for case in layout_cases.read_table(layout_cases.SUITE + layout_cases.BEYOND)]
    assert len(names) == len(set(names)) >= 24


def test_nan_is_never_close_to_the_reference():
    true = {"chosen": np.ones(2), "of an expert that nobody chose": np.zeros(2)}
    assert relative_error(true, true) == 0
    for wrong in (np.array([1, np.nan]), np.array([1, np.inf]), np.array([0, 1e-9])):
        for name in true:
            with np.errstate(divide="ignore"):
                assert not relative_error(true | {name: wrong}, true) <= layout_cases.BAR


splitting_case = test_splitting.case


@pytest.mark.parametrize("name", test_splitting.ALGORITHMS)
def test_every_loss_sees_whole_responses_under_context_parallelism(pools, splitting_case, name):
    """Means, entropy quantiles and masks of responses of 1 to 22 tokens that are split over the ranks; of the mini-batch too."""
    options, case = test_splitting.options(name), splitting_case
    settings = RankSettings(
        case.directory,
        TrainerOptions(dtype="float32", context_parallel=2, micro_batch_tokens=60),
        OptimizerOptions(),
        options,
        temperature=1.0,
        seed=0,
        responses_per_prompt=test_splitting.RESPONSES_PER_PROMPT,
        max_response_tokens=test_splitting.MAX_TOKENS,
    )
    reference = case.reference if options.has_kl else None
    results = pools(2).run(workloads.one_step, settings, case.batch, case.old, reference, case.advantages)
    loss, gradients = test_splitting.truth(case, name)
    for result in results:
        total, part = result["tally"]["loss"]
        assert part == pytest.approx(1, abs=1e-12) and total == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert relative_error(results[0]["gradients"], gradients) <= 1e-5


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    paths = {}
    for family in ("qwen2", "qwen3_moe"):
        paths[family] = tmp_path_factory.mktemp("model")
        save_tiny(family, paths[family], tied=True, vocab_size=test_update.VOCAB, num_hidden_layers=4)
    return paths


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen2", {**PP2_VPP2, "micro_batch_tokens": 20}),
        ("qwen2", {**PP2_VPP2, **DP2_DISTRIBUTED, "micro_batch_tokens": 1}),
        ("qwen2", {**TP2_SP, "context_parallel": 2, "micro_batch_tokens": 30}),
        ("qwen3_moe", {"expert_parallel": 2, **DP2_DISTRIBUTED, "micro_batch_tokens": 1}),
    ],
    ids=str,
)
def test_six_off_policy_updates_equal_those_of_one_process(pools, directories, family, layout):
    """Some micro-batches are empty. The tolerance is float32 rounding carried through six Adam steps."""
    given = test_update.batch()
    expected_report, expected = test_update.update(pools, directories[family], given, micro_batch_tokens=10_000)
    report, weights = test_update.update(pools, directories[family], given, **layout)
    assert len(report.gradient_norms) == 6 and np.allclose(report.gradient_norms, expected_report.gradient_norms, rtol=1e-4)
    assert max(np.abs(weights[name] - expected[name]).max() for name in expected) < 2e-5
    assert {name: count for name, (_, count) in report.tally.items()} == {n: count for n, (_, count) in expected_report.tally.items()}
    assert report.tokens == expected_report.tokens


STATES = {
    "PP2 VPP2 bfloat16": ("qwen2", {**PP2_VPP2, "dtype": "bfloat16"}),
    "PP2 VPP2 DP2 distributed": ("qwen2", {**PP2_VPP2, **DP2_DISTRIBUTED}),
    "CP2 distributed": ("qwen2", {"context_parallel": 2, "distributed_optimizer": True}),
    "EP2 bfloat16": ("qwen3_moe", {"expert_parallel": 2, "data_parallel": 2, "dtype": "bfloat16"}),
    "EP2 DP4 distributed": ("qwen3_moe", {"expert_parallel": 2, "data_parallel": 4, "distributed_optimizer": True}),
}


@pytest.mark.parametrize("name", STATES)
def test_the_optimizer_state_has_the_names_of_the_weight_map_and_can_be_resumed_from(pools, directories, name):
    family, layout = STATES[name]
    settings = RankSettings(
        directories[family],
        TrainerOptions(**{"dtype": "float32", "micro_batch_tokens": 60} | layout),
        OptimizerOptions(lr=1e-3, warmup_steps=1),
        AlgorithmOptions(epochs=1, mini_batch_prompts=3),
        temperature=0.9,
        seed=0,
        responses_per_prompt=3,
        max_response_tokens=12,
    )
    results = pools(settings.sizes.world).run(state_workloads.interrupted, settings, test_update.batch())
    model, slabs = read_model(settings.model_directory), {}
    shapes = {}
    for rank, result in enumerate(results):
        assert result["by reading"] == result["by copying"] == result["by restoring"] == [] and result["draws"]
        at = settings.sizes.coordinates(rank)
        ours = weight_layout(model.architecture, model.dims, settings.sizes, at)
        assert result["kept"]["weights"].keys() == ours.parameter_shapes.keys() >= result["kept"]["ranges"].keys()
        for parameter, shape in ours.parameter_shapes.items():
            expert = parameter in ours.expert_parameters
            home = (parameter, at.pipeline, *((at.expert, at.expert_tensor) if expert else (at.tensor,)))
            # A replica's rank may hold no shard.
            slabs.setdefault(home, []).append(result["kept"]["ranges"].get(parameter, (0, 0)))
            shapes[home] = shape
    for home, shape in shapes.items():
        size = int(np.prod(shape))
        if settings.trainer.distributed_optimizer:
            edges = [0, *(edge for start, stop in sorted(slabs[home]) if stop for edge in (start, stop)), size]
            assert edges[::2] == edges[1::2], (home, slabs[home])
        else:
            assert set(slabs[home]) == {(0, size)}, home


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen2", {"expert_parallel": 2, "data_parallel": 2}, "the model has no experts; leave them out"),
        ("qwen2", {"expert_tensor_parallel": 1}, "trainer.expert_tensor_parallel=1: the model has no experts; leave it out"),
        ("qwen2", {**PP2_VPP2, "virtual_pipeline": 3}, "does not divide the model's 4 layers; their product must be one of [1, 2, 4]"),
        ("qwen3_moe", {"tensor_parallel": 2}, "set trainer.sequence_parallel=true"),
        ("qwen3_moe", {"expert_parallel": 3, "data_parallel": 3}, "does not divide the model's 4 experts; choose one of [1, 2, 4]"),
        ("qwen3_moe", {"expert_parallel": 4, "context_parallel": 2}, "does not divide the 2 ranks of a pipeline stage"),
        ("qwen3_moe", {"expert_tensor_parallel": 2}, "does not divide the 1 ranks of a pipeline stage"),
    ],
)
def test_layouts_that_do_not_fit_the_model_are_refused(directories, family, options, message):
    trainer = TrainerOptions(**options)
    settings = RankSettings(directories[family], trainer, OptimizerOptions(), AlgorithmOptions(), 1.0, 0, 3, 12)
    with pytest.raises(UserError) as caught:
        settings.check_model(read_model(directories[family]).dims)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "whole"),
        ({**TP2_SP, **PP2_VPP2, "context_parallel": 2}, "TP2 SP PP2 VPP2 CP2"),
        ({"data_parallel": 4, "expert_parallel": 2, "expert_tensor_parallel": 1}, "DP4 EP2 ETP1"),
    ],
)
def test_a_layout_is_named_by_its_parallel_axes(options, words):
    assert RankSettings("", TrainerOptions(**options), OptimizerOptions(), AlgorithmOptions(), 1.0, 0, 2, 8).layout == words


def test_options_of_the_local_layers_are_refused_with_other_layers():
    from megatron_aspo.trainer import megatron_adapter

    megatron_adapter.prepare()  # before anything else imports Megatron-Core
    from megatron_aspo.trainer.layers import check_layers

    options = TrainerOptions(shared_prompts=True)
    check_layers(options, "local")
    with pytest.raises(UserError, match=r"trainer.shared_prompts=true needs trainer.layer_spec=local: .*; set it to"):
        check_layers(options, "transformer_engine")
    check_layers(TrainerOptions(context_parallel=2), "transformer_engine")


@pytest.mark.parametrize("name", ["qwen2 tied CP2 DP2 distributed", "qwen3_moe tied DP2 EP2"])
def test_a_trainer_that_is_closed_leaves_its_process_groups(pools, made, name):
    """Each group has threads; a trainer has about twenty groups."""
    case = CASES[name]
    threads = []
    for _ in range(3):
        run(pools, made(case), "aspo", **case.options)
        threads.append(max(pools(case.processes).run(workloads.count_threads)))
    assert threads[2] <= threads[0], threads
