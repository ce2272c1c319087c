"""The one table per model family: for each Hugging Face tensor, its Megatron parameter and how tensor parallelism cuts it.

Megatron fuses query, key and value into one matrix, interleaved by key-value group: [q of group 0, k 0, v 0, q of group 1, …]; gate and up
projections into one, each rank holding its share of the gate rows, then its share of the up rows. Transformer Engine's layers keep the norm
weights inside the linear layer that follows: hence two namings.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_aspo.weights.layout import (
    Box,
    Coordinates,
    Cut,
    Layout,
    ModelDims,
    ParallelSizes,
    Piece,
    check_exact_cover,
    check_parameters_filled,
    padded_vocab,
)

NAMINGS = ("local", "transformer_engine")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One Hugging Face tensor (of each layer, where the name holds `{layer}`) and its home."""

    tensor: str
    parameter: str
    """Name under Megatron's local layers."""
    shape: Callable[[ModelDims], Shape]
    """Shape of the whole Hugging Face tensor."""
    cut: Callable[[ModelDims, int, int], list[Cut]]
    """(dims, tensor-parallel size, rank) → runs of this rank along `axis`."""
    local_extent: Callable[[ModelDims, int], int]
    """(dims, tensor-parallel size) → length of this rank's parameter along `axis`."""
    axis: int = 0
    te_parameter: str = ""
    """Name under Transformer Engine's layers, where it differs."""
    when: Callable[[ModelDims], bool] = lambda dims: True
    stage: str = "layer"
    """`first | layer | last`: which pipeline stage holds it."""

    def parameter_name(self, naming: str) -> str:
        return self.te_parameter if naming == "transformer_engine" and self.te_parameter else self.parameter


# --- how tensor parallelism cuts --------------------------------------------------------------------------------------------------------


def _whole(extent: Callable[[ModelDims], int]):
    return lambda d, size, rank: [Cut(0, 0, extent(d))], lambda d, size: extent(d)


def _even(extent: Callable[[ModelDims], int]):
    def cut(d: ModelDims, size: int, rank: int) -> list[Cut]:
        length = extent(d) // size
        return [Cut(rank * length, 0, length)]

    return cut, lambda d, size: extent(d) // size


def _vocab_rows():
    def cut(d: ModelDims, size: int, rank: int) -> list[Cut]:
        rows = padded_vocab(d.vocab, size) // size
        start = rank * rows
        return [Cut(start, 0, max(0, min(rows, d.vocab - start)))]

    return cut, lambda d, size: padded_vocab(d.vocab, size) // size


def _qkv_rows(part: str):
    def cut(d: ModelDims, size: int, rank: int) -> list[Cut]:
        per_group = d.heads // d.kv_heads
        group_rows = (per_group + 2) * d.head_dim
        offset, length = {
            "q": (0, per_group * d.head_dim),
            "k": (per_group * d.head_dim, d.head_dim),
            "v": ((per_group + 1) * d.head_dim, d.head_dim),
        }[part]
        groups = d.kv_heads // size
        return [Cut((rank * groups + g) * length, g * group_rows + offset, length) for g in range(groups)]

    return cut, lambda d, size: (d.heads + 2 * d.kv_heads) * d.head_dim // size


def _gate_up_rows(part: str):
    def cut(d: ModelDims, size: int, rank: int) -> list[Cut]:
        length = d.ffn // size
        return [Cut(rank * length, 0 if part == "gate" else length, length)]

    return cut, lambda d, size: 2 * d.ffn // size


def _rule(tensor: str, parameter: str, shape: Callable[[ModelDims], Shape], how, **fields) -> Rule:
    cut, local_extent = how
    return Rule(tensor, parameter, shape, cut, local_extent, **fields)


# --- the families -------------------------------------------------------------------------------------------------------------------------

_HF = "model.layers.{layer}."
_MCORE = "decoder.layers.{layer}."
_ATTENTION = _MCORE + "self_attention."


def _decoder_rules() -> tuple[Rule, ...]:
    """Llama, Qwen2, Qwen3: pre-norm decoder, grouped-query attention, SwiGLU, optional bias of query, key and value, optional norm of query
    and key heads.
    """
    qkv = [
        rule
        for part, heads in (("q", lambda d: d.heads), ("k", lambda d: d.kv_heads), ("v", lambda d: d.kv_heads))
        for rule in (
            _rule(
                f"{_HF}self_attn.{part}_proj.weight",
                _ATTENTION + "linear_qkv.weight",
                lambda d, heads=heads: (heads(d) * d.head_dim, d.hidden),
                _qkv_rows(part),
            ),
            _rule(
                f"{_HF}self_attn.{part}_proj.bias",
                _ATTENTION + "linear_qkv.bias",
                lambda d, heads=heads: (heads(d) * d.head_dim,),
                _qkv_rows(part),
                when=lambda d: d.qkv_bias,
            ),
        )
    ]
    return (
        _rule(
            "model.embed_tokens.weight",
            "embedding.word_embeddings.weight",
            lambda d: (d.vocab, d.hidden),
            _vocab_rows(),
            stage="first",
        ),
        _rule(
            _HF + "input_layernorm.weight",
            _MCORE + "input_layernorm.weight",
            lambda d: (d.hidden,),
            _whole(lambda d: d.hidden),
            te_parameter=_ATTENTION + "linear_qkv.layer_norm_weight",
        ),
        *qkv,
        *(
            _rule(
                f"{_HF}self_attn.{part}_norm.weight",
                f"{_ATTENTION}{part}_layernorm.weight",
                lambda d: (d.head_dim,),
                _whole(lambda d: d.head_dim),
                when=lambda d: d.qk_norm,
            )
            for part in ("q", "k")
        ),
        _rule(
            _HF + "self_attn.o_proj.weight",
            _ATTENTION + "linear_proj.weight",
            lambda d: (d.hidden, d.heads * d.head_dim),
            _even(lambda d: d.heads * d.head_dim),
            axis=1,
        ),
        _rule(
            _HF + "post_attention_layernorm.weight",
            _MCORE + "pre_mlp_layernorm.weight",
            lambda d: (d.hidden,),
            _whole(lambda d: d.hidden),
            te_parameter=_MCORE + "mlp.linear_fc1.layer_norm_weight",
        ),
        *(
            _rule(
                f"{_HF}mlp.{part}_proj.weight",
                _MCORE + "mlp.linear_fc1.weight",
                lambda d: (d.ffn, d.hidden),
                _gate_up_rows(part),
            )
            for part in ("gate", "up")
        ),
        _rule(
            _HF + "mlp.down_proj.weight",
            _MCORE + "mlp.linear_fc2.weight",
            lambda d: (d.hidden, d.ffn),
            _even(lambda d: d.ffn),
            axis=1,
        ),
        _rule(
            "model.norm.weight",
            "decoder.final_layernorm.weight",
            lambda d: (d.hidden,),
            _whole(lambda d: d.hidden),
            stage="last",
        ),
        _rule(
            "lm_head.weight",
            "output_layer.weight",
            lambda d: (d.vocab, d.hidden),
            _vocab_rows(),
            stage="last",
            when=lambda d: not d.tied,
        ),
        # Tied and cut into stages: the last stage keeps its own copy of the embedding as its output matrix.
        _rule(
            "model.embed_tokens.weight",
            "output_layer.weight",
            lambda d: (d.vocab, d.hidden),
            _vocab_rows(),
            stage="last_if_apart",
            when=lambda d: d.tied,
        ),
    )


FAMILIES: dict[str, tuple[Rule, ...]] = {
    "LlamaForCausalLM": _decoder_rules(),
    "Qwen2ForCausalLM": _decoder_rules(),
    "Qwen3ForCausalLM": _decoder_rules(),
}
"""By the `architectures` entry of a Hugging Face config."""


def _full(shape: Shape, axis: int, start: int, length: int) -> Box:
    return tuple((start, start + length) if i == axis else (0, extent) for i, extent in enumerate(shape))


def _layers_of(rule: Rule, dims: ModelDims, sizes: ParallelSizes, stage: int) -> list[tuple[int | None, int | None]]:
    """(index in the whole model, index in this stage) of each layer for which this stage holds the rule's tensor."""
    first, last = stage == 0, stage == sizes.pipeline - 1
    if rule.stage == "layer":
        count = dims.layers // sizes.pipeline
        return [(stage * count + i, i) for i in range(count)]
    here = {"first": first, "last": last, "last_if_apart": last and not first}[rule.stage]
    return [(None, None)] if here else []


def tensor_shapes(architecture: str, dims: ModelDims) -> dict[str, Shape]:
    """Name → shape of every tensor of the Hugging Face checkpoint, in the table's order."""
    shapes: dict[str, Shape] = {}
    rules = [rule for rule in FAMILIES[architecture] if rule.when(dims)]
    for rule in (r for r in rules if r.stage == "first"):
        shapes[rule.tensor] = rule.shape(dims)
    for layer in range(dims.layers):
        for rule in (r for r in rules if r.stage == "layer"):
            shapes[rule.tensor.format(layer=layer)] = rule.shape(dims)
    for rule in (r for r in rules if r.stage.startswith("last")):
        shapes.setdefault(rule.tensor, rule.shape(dims))
    return shapes


def layout(architecture: str, dims: ModelDims, sizes: ParallelSizes, at: Coordinates, naming: str = "local") -> Layout:
    """What the rank at these coordinates holds. Parameter names count layers from the start of the rank's own stage."""
    pieces, shapes, padding = [], {}, {}
    for rule in FAMILIES[architecture]:
        if not rule.when(dims):
            continue
        for layer, local_layer in _layers_of(rule, dims, sizes, at.pipeline):
            tensor = rule.tensor.format(layer=layer)
            parameter = rule.parameter_name(naming).format(layer=local_layer)
            shape = rule.shape(dims)
            extent = rule.local_extent(dims, sizes.tensor)
            local_shape = tuple(extent if i == rule.axis else n for i, n in enumerate(shape))
            shapes[parameter] = local_shape
            for cut in rule.cut(dims, sizes.tensor, at.tensor):
                if cut.length:
                    box = _full(shape, rule.axis, cut.start, cut.length)
                    pieces.append(Piece(tensor, box, parameter, _full(local_shape, rule.axis, cut.local, cut.length)))
            if "word_embeddings" in parameter or "output_layer" in parameter:
                rows = sum(cut.length for cut in rule.cut(dims, sizes.tensor, at.tensor))
                padding[parameter] = (extent - rows) * dims.hidden
    result = Layout(tuple(pieces), shapes)
    check_parameters_filled(result, padding)
    return result


def replica_layouts(architecture: str, dims: ModelDims, sizes: ParallelSizes, naming: str = "local") -> dict[int, Layout]:
    """Rank → layout for the ranks of the first data-parallel replica, proved to hold the model exactly once."""
    ranks = [rank for rank in range(sizes.world) if sizes.coordinates(rank).data == 0]
    layouts = {rank: layout(architecture, dims, sizes, sizes.coordinates(rank), naming) for rank in ranks}
    check_exact_cover(layouts.values(), tensor_shapes(architecture, dims))
    return layouts
