"""The weight map: exact cover on every layout, both namings, and refusals."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_aspo.errors import UserError
from megatron_aspo.weights.families import FAMILIES, layout, replica_layouts, tensor_shapes
from megatron_aspo.weights.layout import Layout, ModelDims, ParallelSizes, Piece, check_divisible, check_exact_cover


def dims(**changes) -> ModelDims:
    base = ModelDims(layers=4, hidden=24, heads=8, kv_heads=4, head_dim=3, ffn=16, vocab=37, tied=False, qkv_bias=True)
    return replace(base, **changes)


@settings(max_examples=60, deadline=None)
@given(
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2, 4]),
    data=st.sampled_from([1, 3]),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    head_dim=st.integers(1, 5),
    vocab=st.integers(16, 70),
    tied=st.booleans(),
    family=st.sampled_from(sorted(FAMILIES)),
)
def test_numbered_elements_come_back_from_every_layout(tensor, pipeline, data, groups, per_group, head_dim, vocab, tied, family):
    """Fill parameters from tensors whose elements are numbered, read them back box by box, and find each number once per home."""
    d = dims(
        kv_heads=groups * tensor,
        heads=groups * tensor * per_group,
        head_dim=head_dim,
        vocab=vocab,
        tied=tied,
        qkv_bias=family.startswith("Qwen2"),
        qk_norm=family.startswith("Qwen3"),
    )
    sizes = ParallelSizes(tensor, pipeline, data)
    shapes = tensor_shapes(family, d)
    starts = np.cumsum([0] + [int(np.prod(s)) for s in shapes.values()])
    whole = {name: np.arange(np.prod(s)).reshape(s) + start for (name, s), start in zip(shapes.items(), starts)}
    found: dict[str, np.ndarray] = {name: np.zeros(s, bool) for name, s in shapes.items()}
    for rank_layout in replica_layouts(family, d, sizes).values():
        parameters = {name: np.full(shape, -1) for name, shape in rank_layout.parameter_shapes.items()}
        for piece in rank_layout.pieces:
            target = parameters[piece.parameter][tuple(slice(*e) for e in piece.local)]
            assert (target == -1).all(), "two pieces on one element"
            target[...] = whole[piece.tensor][tuple(slice(*e) for e in piece.box)]
            found[piece.tensor][tuple(slice(*e) for e in piece.box)] = True
        for name, values in parameters.items():
            if "embedding" not in name and "output_layer" not in name:
                assert (values >= 0).all(), f"{name} not filled"
    assert all(f.all() for f in found.values())


def test_qkv_is_interleaved_by_group_as_megatron_reads_it():
    """Megatron views the fused matrix as [groups, q per group + 2, head size]: checked against that view, with numbered rows."""
    d = dims()
    (one,) = replica_layouts("LlamaForCausalLM", d, ParallelSizes()).values()
    fused = np.empty((d.heads + 2 * d.kv_heads) * d.head_dim, dtype=object)
    for piece in one.pieces:
        if piece.parameter == "decoder.layers.0.self_attention.linear_qkv.weight":
            (start, stop), _ = piece.box
            fused[slice(*piece.local[0])] = [(piece.tensor.split(".")[-2][0], row) for row in range(start, stop)]
    groups = fused.reshape(d.kv_heads, d.heads // d.kv_heads + 2, d.head_dim)
    for g, h, i in itertools.product(range(d.kv_heads), range(groups.shape[1]), range(d.head_dim)):
        kind, head = {2: ("k", g), 3: ("v", g)}.get(h, ("q", g * 2 + h))
        assert groups[g, h, i] == (kind, head * d.head_dim + i)


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


@pytest.mark.parametrize("boxes", [[((0, 2),)], [((0, 2),), ((1, 4),)], [((0, 4),), ((0, 2),)]], ids=["hole", "overlap", "doubled"])
def test_a_map_that_does_not_cover_exactly_is_refused(boxes):
    layouts = [Layout((Piece("t", box, "p", box),), {"p": (4,)}) for box in boxes]
    with pytest.raises(UserError, match="covers"):
        check_exact_cover(layouts, {"t": (4,)})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (ParallelSizes(tensor=3), "does not divide the model's 8 attention heads"),
        (ParallelSizes(pipeline=3), "does not divide the model's 4 layers"),
    ],
)
def test_a_layout_that_cannot_cut_the_model_is_refused_with_the_choices(sizes, message):
    with pytest.raises(UserError, match=message):
        check_divisible(dims(), sizes)


def test_ranks_are_numbered_tensor_then_data_then_pipeline():
    sizes = ParallelSizes(tensor=2, pipeline=2, data=3)
    seen = [(c.pipeline, c.data, c.tensor) for c in map(sizes.coordinates, range(sizes.world))]
    assert seen == sorted(seen) and len(set(seen)) == 12
