"""The weight map: exact cover on every layout, both namings, and refusals."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_aspo.common.errors import UserError
from megatron_aspo.weights.families import FAMILIES, NAMINGS, layout, replica_layouts, tensor_shapes
from megatron_aspo.weights.layout import Layout, ModelDims, ParallelSizes, Piece, check_divisible, check_exact_cover, overlap, stacked


def dims(**changes) -> ModelDims:
    base = ModelDims(layers=4, hidden=24, heads=8, kv_heads=4, head_dim=3, ffn=16, vocab=37, tied=False, qkv_bias=True)
    return replace(base, **changes)


def family_dims(family: str, experts: int, moe_ffn: int, **changes) -> ModelDims:
    if has_experts(family):
        changes |= {"experts": experts, "moe_ffn": moe_ffn}
    return dims(qkv_bias=family.startswith("Qwen2"), qk_norm=family.startswith("Qwen3"), **changes)


def has_experts(family: str) -> bool:
    return "Moe" in family or "Mixtral" in family


# --- Megatron's own view, without the table: whole fused matrices first, then even shares of them -----------------------------------------


def megatron_parameters(family: str, d: ModelDims, whole: dict[str, np.ndarray], sizes: ParallelSizes, rank: int) -> dict[str, np.ndarray]:
    """Return every parameter of one rank under the local names, sliced from whole Hugging Face tensors; −1 is padding."""
    stage, inside = divmod(rank, sizes.tensor * sizes.data)
    tp, etp = sizes.tensor, sizes.tensor if sizes.expert_tensor is None else sizes.expert_tensor
    # For the experts, Megatron lays out the ranks of a stage as [expert data, expert, expert tensor], tensor fastest.
    _, expert_rank, expert_tensor_rank = np.argwhere(np.arange(tp * sizes.data).reshape(-1, sizes.expert, etp) == inside)[0]
    tensor_rank = inside % tp

    def share(matrix: np.ndarray, axis: int, ways: int = tp, which: int = tensor_rank) -> np.ndarray:
        return np.split(matrix, ways, axis=axis)[which]

    def vocab(matrix: np.ndarray) -> np.ndarray:
        return share(np.pad(matrix, ((0, -len(matrix) % tp), (0, 0)), constant_values=-1), 0)

    def fused_qkv(kind: str, prefix: str) -> np.ndarray:
        q, k, v = (whole[f"{prefix}self_attn.{part}_proj.{kind}"] for part in "qkv")
        groups = [part.reshape(d.kv_heads, -1, *part.shape[1:]) for part in (q, k, v)]
        return share(np.concatenate(groups, axis=1).reshape(-1, *q.shape[1:]), 0)

    def gate_up(gate: np.ndarray, up: np.ndarray, ways: int, which: int) -> np.ndarray:
        # [2, ways, rows of a share, …]: a rank holds its share of both.
        return np.stack([gate, up]).reshape(2, ways, -1, d.hidden)[:, which].reshape(-1, d.hidden)

    block, names = {"Mixtral": ("block_sparse_moe", ("w1", "w3", "w2"))}.get(
        family.removesuffix("ForCausalLM"), ("mlp", ("gate_proj", "up_proj", "down_proj"))
    )
    expert_share = np.split(np.arange(d.experts), sizes.expert)[expert_rank] if d.experts else []
    # Layers are distributed chunk by chunk, and within a chunk over the stages in order.
    dealt = np.arange(d.layers).reshape(sizes.virtual, sizes.pipeline, -1)[:, stage]
    found: dict[str, np.ndarray] = {}
    for chunk, layers in enumerate(dealt):
        model = f"model{chunk}." if sizes.virtual > 1 else ""
        if stage == 0 and chunk == 0:
            found[model + "embedding.word_embeddings.weight"] = vocab(whole["model.embed_tokens.weight"])
        for local, layer in enumerate(layers):
            hf, mcore = f"model.layers.{layer}.", f"{model}decoder.layers.{local}."
            found[mcore + "input_layernorm.weight"] = whole[hf + "input_layernorm.weight"]
            found[mcore + "pre_mlp_layernorm.weight"] = whole[hf + "post_attention_layernorm.weight"]
            found[mcore + "self_attention.linear_qkv.weight"] = fused_qkv("weight", hf)
            if d.qkv_bias:
                found[mcore + "self_attention.linear_qkv.bias"] = fused_qkv("bias", hf)
            if d.qk_norm:
                found[mcore + "self_attention.q_layernorm.weight"] = whole[hf + "self_attn.q_norm.weight"]
                found[mcore + "self_attention.k_layernorm.weight"] = whole[hf + "self_attn.k_norm.weight"]
            found[mcore + "self_attention.linear_proj.weight"] = share(whole[hf + "self_attn.o_proj.weight"], 1)
            if not d.experts:
                gate, up, down = (whole[f"{hf}mlp.{name}.weight"] for name in names)
                found[mcore + "mlp.linear_fc1.weight"] = gate_up(gate, up, tp, tensor_rank)
                found[mcore + "mlp.linear_fc2.weight"] = share(down, 1)
                continue
            found[mcore + "mlp.router.weight"] = whole[f"{hf}{block}.gate.weight"]
            for i, expert in enumerate(expert_share):
                gate, up, down = (whole[f"{hf}{block}.experts.{expert}.{name}.weight"] for name in names)
                home = f"{mcore}mlp.experts.local_experts.{i}."
                found[home + "linear_fc1.weight"] = gate_up(gate, up, etp, expert_tensor_rank)
                found[home + "linear_fc2.weight"] = share(down, 1, etp, expert_tensor_rank)
        if stage == sizes.pipeline - 1 and chunk == sizes.virtual - 1:
            found[model + "decoder.final_layernorm.weight"] = whole["model.norm.weight"]
            if not d.tied:
                found[model + "output_layer.weight"] = vocab(whole["lm_head.weight"])
            elif sizes.pipeline > 1:
                found[model + "output_layer.weight"] = vocab(whole["model.embed_tokens.weight"])
    return found


@st.composite
def layouts(draw) -> tuple[str, ModelDims, ParallelSizes]:
    """Draw a family, dimensions, and a layout of at most 8 ranks that can split them."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    tensor, pipeline, data = draw(st.sampled_from([s for s in itertools.product((1, 2, 3, 4, 8), repeat=3) if np.prod(s) <= 8]))
    virtual = draw(st.sampled_from([1, 2, 3])) if pipeline > 1 else 1
    expert = expert_tensor = None
    if has_experts(family):
        ways = [n for n in range(1, tensor * data + 1) if tensor * data % n == 0]
        expert = draw(st.sampled_from(ways))
        expert_tensor = draw(st.sampled_from([n for n in ways if tensor * data // expert % n == 0]))
        if expert_tensor == tensor:
            expert_tensor = draw(st.sampled_from([None, tensor]))
    # 1, 2, 3 or as many key-value heads as heads, where tensor parallelism can split them.
    kv_heads = draw(st.sampled_from([n for n in (1, 2, 3, tensor, 2 * tensor) if tensor % n == 0 or n % tensor == 0]))
    per_group = draw(st.sampled_from([n for n in range(1, 9) if n * kv_heads % tensor == 0]))
    whole_shares = [n for n in range(1, 13) if (kv_heads * per_group + 2 * kv_heads) * n % tensor == 0]
    d = family_dims(
        family,
        layers=pipeline * virtual * draw(st.integers(1, 2)),
        hidden=draw(st.integers(1, 5)),
        heads=kv_heads * per_group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from(whole_shares[:3])),
        ffn=tensor * draw(st.integers(1, 3)),
        vocab=draw(st.integers(1, 40)),
        tied=draw(st.booleans()),
        experts=(expert or 1) * draw(st.integers(1, 3)),
        moe_ffn=(expert_tensor or tensor) * draw(st.integers(1, 3)),
    )
    return family, d, ParallelSizes(tensor, pipeline, data, virtual, expert or 1, expert_tensor)


def numbered(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return tensors in which every number is unique."""
    starts = np.cumsum([0] + [int(np.prod(s)) for s in shapes.values()])
    return {name: np.arange(np.prod(s)).reshape(s) + start for (name, s), start in zip(shapes.items(), starts)}


def filled(of: Layout, whole: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return this rank's parameters, filled piece by piece; −1 where no piece is."""
    parameters = {name: np.full(shape, -1) for name, shape in of.parameter_shapes.items()}
    for piece in of.pieces:
        target = parameters[piece.parameter][tuple(slice(*e) for e in piece.local)]
        assert (target == -1).all(), "two pieces on one element"
        target[...] = whole[piece.tensor][tuple(slice(*e) for e in piece.box)]
    return parameters


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_every_rank_holds_the_boxes_of_megatrons_fused_matrices(drawn):
    family, d, sizes = drawn
    check_divisible(d, sizes)
    whole = numbered(tensor_shapes(family, d))
    for rank in range(sizes.world):
        parameters = filled(layout(family, d, sizes, sizes.coordinates(rank)), whole)
        expected = megatron_parameters(family, d, whole, sizes, rank)
        assert parameters.keys() == expected.keys()
        for name in expected:
            assert np.array_equal(parameters[name], expected[name]), name


@settings(max_examples=100, deadline=None)
@given(layouts(), st.sampled_from(NAMINGS))
def test_the_first_copy_holds_every_element_once_per_home(drawn, naming):
    """One home, except for parameters that tensor-parallel ranks replicate and for the tied embedding of a pipelined model."""
    family, d, sizes = drawn
    whole = numbered(tensor_shapes(family, d))
    count = np.zeros(sum(t.size for t in whole.values()), int)
    for part in replica_layouts(family, d, sizes, naming).values():
        for values in filled(part, whole).values():
            np.add.at(count, values[values >= 0], 1)
    for name, numbers in whole.items():
        homes = 1
        if "norm" in name or name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight")):
            homes = sizes.tensor
        elif name == "model.embed_tokens.weight" and d.tied and sizes.pipeline > 1:
            homes = 2
        assert (count[numbers] == homes).all(), name


def test_the_first_copy_of_experts_may_be_on_other_ranks_than_the_rest():
    """Two data-parallel replicas, experts over both: rank 1 holds half of the experts and repeats the rest."""
    d = family_dims("MixtralForCausalLM", experts=4, moe_ffn=6)
    parts = replica_layouts("MixtralForCausalLM", d, ParallelSizes(data=2, expert=2))
    assert set(parts[1].parameter_shapes) == set(parts[1].expert_parameters) == set(parts[0].expert_parameters)
    assert {p.tensor.split(".")[5] for p in parts[1].pieces} == {"2", "3"}
    assert set(replica_layouts("MixtralForCausalLM", d, ParallelSizes(data=4, expert=2))) == {0, 1}


def test_transformer_engine_names_differ_only_in_the_norms():
    d = dims(qkv_bias=False)
    at = ParallelSizes().coordinates(0)
    local, te = (
        set(layout("LlamaForCausalLM", d, ParallelSizes(), at, naming).parameter_shapes) for naming in ("local", "transformer_engine")
    )
    layers = [f"decoder.layers.{i}." for i in range(d.layers)]
    assert local - te == {p + n for p in layers for n in ("input_layernorm.weight", "pre_mlp_layernorm.weight")}
    assert te - local == {
        p + n for p in layers for n in ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
    }


def test_tied_last_stage_keeps_its_own_copy():
    d = dims(tied=True)
    apart = replica_layouts("LlamaForCausalLM", d, ParallelSizes(pipeline=2))
    assert "output_layer.weight" in apart[1].parameter_shapes
    assert "output_layer.weight" not in replica_layouts("LlamaForCausalLM", d, ParallelSizes())[0].parameter_shapes
    assert "lm_head.weight" not in tensor_shapes("LlamaForCausalLM", d)


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 2), (0, 2))],
        [((0, 2), (0, 2)), ((1, 4), (0, 2))],
        [((0, 4), (0, 2)), ((0, 2), (0, 2))],
        # In sorted order the first and the last overlap; neighbours do not, and the element counts add up.
        [((0, 4), (0, 1)), ((1, 2), (1, 2)), ((2, 3), (0, 1)), ((3, 4), (1, 2)), ((0, 1), (1, 2))],
        [((0, 4), (0, 1)), ((0, 4), (1, 3))],
    ],
    ids=["hole", "overlap", "doubled", "far overlap and hole", "beyond the edge"],
)
def test_a_map_that_does_not_cover_exactly_is_refused(boxes):
    made = [Layout((Piece("t", box, "p", box),), {"p": (4, 2)}) for box in boxes]
    with pytest.raises(UserError, match="covers t"):
        check_exact_cover(made, {"t": (4, 2)})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4)).map(sorted).filter(lambda e: e[0] < e[1])] * 2), max_size=5))
def test_a_map_is_refused_exactly_when_element_counts_differ_from_one(drawn):
    boxes = {tuple(tuple(edge) for edge in box) for box in drawn}
    count = np.zeros((4, 3), int)
    beyond = any(box[1][1] > 3 for box in boxes)
    for box in boxes:
        count[tuple(slice(*edge) for edge in box)] += 1
    made = [Layout((Piece("t", box, "p", box),), {}) for box in boxes]
    if beyond or (count != 1).any():
        with pytest.raises(UserError, match="covers t"):
            check_exact_cover(made, {"t": (4, 3)})
    else:
        check_exact_cover(made, {"t": (4, 3)})


MOE = {"experts": 6, "moe_ffn": 8}


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [
        ({}, ParallelSizes(tensor=3), r"tensor_parallel=3 does not divide the model's 8 attention heads; choose one of \[1, 2, 4, 8\]"),
        ({"kv_heads": 3, "heads": 12}, ParallelSizes(tensor=2), "2 does not divide the model's 3 key-value heads, nor is it a multiple"),
        ({"kv_heads": 1, "ffn": 30}, ParallelSizes(tensor=4), r"4 does not divide the model's 30 rows of query, key and value"),
        ({"ffn": 18}, ParallelSizes(tensor=4), r"4 does not divide the model's 18 feed-forward channels; choose one of \[1, 2\]"),
        ({}, ParallelSizes(pipeline=3), r"pipeline_parallel=3 does not divide the model's 4 layers; choose one of \[1, 2, 4\]"),
        ({}, ParallelSizes(virtual=2), "virtual_pipeline=2 interleaves pipeline stages, of which there is one; set it to 1"),
        ({}, ParallelSizes(pipeline=2, virtual=4), r"virtual_pipeline=4 does not divide .* must be one of \[1, 2, 4\]"),
        ({}, ParallelSizes(data=2, expert=2), "expert_parallel=2.*the model has no experts"),
        (MOE, ParallelSizes(data=4, expert=4), r"expert_parallel=4 does not divide the model's 6 experts; choose one of \[1, 2, 3, 6\]"),
        (MOE, ParallelSizes(data=3, expert_tensor=3), r"3 does not divide the 8 feed-forward channels of an expert; choose one of \[1, 2"),
        (MOE, ParallelSizes(tensor=2, expert=2), r"2 × .*=2 does not divide the 2 ranks of a pipeline stage .* one of \[1, 2\]"),
    ],
)
def test_a_layout_that_cannot_split_the_model_is_refused_with_the_choices(changes, sizes, message):
    with pytest.raises(UserError, match=message):
        check_divisible(dims(**changes), sizes)


def test_ranks_are_numbered_tensor_then_data_then_pipeline():
    sizes = ParallelSizes(tensor=2, pipeline=2, data=3)
    seen = [(c.pipeline, c.data, c.tensor) for c in map(sizes.coordinates, range(sizes.world))]
    assert seen == sorted(seen) and len(set(seen)) == 12
    experts = [
        (c.pipeline, c.expert_data, c.expert, c.expert_tensor)
        for c in map(replace(sizes, expert=3, expert_tensor=2).coordinates, range(12))
    ]
    assert experts == sorted(experts) and len(set(experts)) == 12


def test_a_rank_outside_the_layout_is_refused():
    with pytest.raises(ValueError, match="rank 4 is outside the 4 ranks"):
        ParallelSizes(tensor=4).coordinates(4)


# --- boxes --------------------------------------------------------------------------------------------------------------------------------


def elements(box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(*edge) for edge in box)))


@given(data=st.data())
def test_an_overlap_holds_the_elements_of_both_boxes(data):
    axes = data.draw(st.integers(1, 3))
    a, b = (tuple(tuple(sorted(data.draw(st.tuples(st.integers(0, 5), st.integers(0, 5))))) for _ in range(axes)) for _ in "ab")
    shared = overlap(a, b)
    assert (elements(shared) if shared else set()) == elements(a) & elements(b)


def test_bands_are_sorted_and_other_boxes_give_none():
    shape = (6, 4)
    assert stacked([((3, 6), (0, 4)), ((0, 1), (0, 4)), ((1, 3), (0, 4))], shape) == [((0, 1), (0, 4)), ((1, 3), (0, 4)), ((3, 6), (0, 4))]
    assert stacked([((0, 2), (0, 4))], shape) == [((0, 2), (0, 4))], "padding may follow"
    assert stacked([((0, 6), (0, 2)), ((0, 6), (2, 4))], shape) is None, "side by side"
    assert stacked([((1, 6), (0, 4))], shape) is None, "the first row is missing"
    assert stacked([((0, 2), (0, 4)), ((3, 6), (0, 4))], shape) is None, "a row between is missing"
    assert stacked([((0, 4), (0, 4)), ((3, 6), (0, 4))], shape) is None, "a row is held twice"
