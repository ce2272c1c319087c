"""The one table per model family: for each Hugging Face tensor, its Megatron parameter and how tensor parallelism shards it.

Transformer Engine's layers keep the weight of a norm inside the linear layer that follows, and number their experts in the name of the
weight, so there are two namings. docs/add_a_family.md walks through a new family.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from megatron_aspo.weights.layout import (
    Box,
    Coordinates,
    Layout,
    ModelDims,
    ParallelSizes,
    Piece,
    check_exact_cover,
    check_parameters_filled,
)
from megatron_aspo.weights.shard_rules import ShardRule, even, gate_up_rows, qkv_rows, vocab_rows, whole

NAMINGS = ("local", "transformer_engine")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One Hugging Face tensor and its Megatron parameter. `{layer}` and `{expert}` in the names stand for each layer and each expert.

    Hugging Face numbers both over the whole model, Megatron over what the rank holds.
    """

    tensor: str
    parameter: str
    """Its name under Megatron's local layers."""
    shape: Callable[[ModelDims], Shape]
    """Shape of the whole Hugging Face tensor."""
    shard_rule: ShardRule
    te_parameter: str = ""
    """Its name under Transformer Engine's layers, where that differs."""
    when: Callable[[ModelDims], bool] = lambda dims: True
    stage: str = "layer"
    """`first | layer | last | last_if_apart`: which pipeline stage holds it."""

    @property
    def of_experts(self) -> bool:
        """Whether it is distributed and sharded by the expert coordinates of the ranks."""
        return "{expert}" in self.tensor

    def parameter_name(self, naming: str) -> str:
        return self.te_parameter if naming == "transformer_engine" and self.te_parameter else self.parameter


# --- the families -------------------------------------------------------------------------------------------------------------------------

_HF = "model.layers.{layer}."
_MCORE = "decoder.layers.{layer}."
_ATTENTION = _MCORE + "self_attention."


def _qkv(part: str, heads: Callable[[ModelDims], int]) -> tuple[Rule, ...]:
    """Return the rules of the query, key or value projection: its weight, and the bias that some families have."""
    return (
        Rule(
            f"{_HF}self_attn.{part}_proj.weight",
            _ATTENTION + "linear_qkv.weight",
            lambda d: (heads(d) * d.head_dim, d.hidden),
            qkv_rows(part),
        ),
        Rule(
            f"{_HF}self_attn.{part}_proj.bias",
            _ATTENTION + "linear_qkv.bias",
            lambda d: (heads(d) * d.head_dim,),
            qkv_rows(part),
            when=lambda d: d.qkv_bias,
        ),
    )


def _head_norm(part: str) -> Rule:
    return Rule(
        f"{_HF}self_attn.{part}_norm.weight",
        f"{_ATTENTION}{part}_layernorm.weight",
        lambda d: (d.head_dim,),
        whole(lambda d: d.head_dim),
        when=lambda d: d.qk_norm,
    )


_EMBEDDING = Rule(
    "model.embed_tokens.weight",
    "embedding.word_embeddings.weight",
    lambda d: (d.vocab, d.hidden),
    vocab_rows(),
    stage="first",
)

# Grouped-query attention with the norm before it; optional bias of query, key and value; optional norm of query and key heads.
_ATTENTION_RULES = (
    Rule(
        _HF + "input_layernorm.weight",
        _MCORE + "input_layernorm.weight",
        lambda d: (d.hidden,),
        whole(lambda d: d.hidden),
        te_parameter=_ATTENTION + "linear_qkv.layer_norm_weight",
    ),
    *_qkv("q", lambda d: d.heads),
    *_qkv("k", lambda d: d.kv_heads),
    *_qkv("v", lambda d: d.kv_heads),
    _head_norm("q"),
    _head_norm("k"),
    Rule(
        _HF + "self_attn.o_proj.weight",
        _ATTENTION + "linear_proj.weight",
        lambda d: (d.hidden, d.heads * d.head_dim),
        even(lambda d: d.heads * d.head_dim, axis=1),
    ),
)

_OUTPUT = (
    Rule("model.norm.weight", "decoder.final_layernorm.weight", lambda d: (d.hidden,), whole(lambda d: d.hidden), stage="last"),
    Rule(
        "lm_head.weight",
        "output_layer.weight",
        lambda d: (d.vocab, d.hidden),
        vocab_rows(),
        stage="last",
        when=lambda d: not d.tied,
    ),
    # Tied, with several pipeline stages: the last stage keeps its own copy of the embedding as its output matrix.
    Rule(
        "model.embed_tokens.weight",
        "output_layer.weight",
        lambda d: (d.vocab, d.hidden),
        vocab_rows(),
        stage="last_if_apart",
        when=lambda d: d.tied,
    ),
)


def _swiglu(hf: str, gate: str, up: str, down: str, mcore: str, ffn: Callable[[ModelDims], int], te: str = "") -> tuple[Rule, ...]:
    """Return the rules of gate, up and down projection; in `mcore` and `te`, `{linear}` stands for linear_fc1 or linear_fc2."""

    def named(name: str, linear: str) -> str:
        return name.replace("{linear}", linear)

    return (
        *(
            Rule(
                f"{hf}{name}.weight",
                named(mcore, "linear_fc1"),
                lambda d: (ffn(d), d.hidden),
                gate_up_rows(part, ffn),
                te_parameter=named(te, "linear_fc1"),
            )
            for part, name in (("gate", gate), ("up", up))
        ),
        Rule(
            f"{hf}{down}.weight",
            named(mcore, "linear_fc2"),
            lambda d: (d.hidden, ffn(d)),
            even(ffn, axis=1),
            te_parameter=named(te, "linear_fc2"),
        ),
    )


def _decoder() -> tuple[Rule, ...]:
    """Return the rules of a dense decoder: Llama, Mistral, Qwen2, Qwen3, Seed-OSS."""
    return (
        _EMBEDDING,
        *_ATTENTION_RULES,
        Rule(
            _HF + "post_attention_layernorm.weight",
            _MCORE + "pre_mlp_layernorm.weight",
            lambda d: (d.hidden,),
            whole(lambda d: d.hidden),
            te_parameter=_MCORE + "mlp.linear_fc1.layer_norm_weight",
        ),
        *_swiglu(_HF + "mlp.", "gate_proj", "up_proj", "down_proj", _MCORE + "mlp.{linear}.weight", lambda d: d.ffn),
        *_OUTPUT,
    )


def _moe_decoder(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Return the rules of a decoder with a router and experts in every layer. block: the family's name for that part of a layer."""
    return (
        _EMBEDDING,
        *_ATTENTION_RULES,
        # Router and experts both read the norm's output, so it is a separate module under either naming.
        Rule(
            _HF + "post_attention_layernorm.weight",
            _MCORE + "pre_mlp_layernorm.weight",
            lambda d: (d.hidden,),
            whole(lambda d: d.hidden),
        ),
        Rule(f"{_HF}{block}.gate.weight", _MCORE + "mlp.router.weight", lambda d: (d.experts, d.hidden), whole(lambda d: d.experts)),
        *_swiglu(
            f"{_HF}{block}.experts.{{expert}}.",
            gate,
            up,
            down,
            _MCORE + "mlp.experts.local_experts.{expert}.{linear}.weight",
            lambda d: d.moe_ffn,
            te=_MCORE + "mlp.experts.{linear}.weight{expert}",
        ),
        *_OUTPUT,
    )


FAMILIES: dict[str, tuple[Rule, ...]] = {
    "LlamaForCausalLM": _decoder(),
    "MistralForCausalLM": _decoder(),
    "Qwen2ForCausalLM": _decoder(),
    "Qwen3ForCausalLM": _decoder(),
    "Qwen3MoeForCausalLM": _moe_decoder("mlp", "gate_proj", "up_proj", "down_proj"),
    "MixtralForCausalLM": _moe_decoder("block_sparse_moe", "w1", "w3", "w2"),
    "SeedOssForCausalLM": _decoder(),
}
"""`architectures` entry of a Hugging Face config → the rules of its tensors."""


# --- reading the table --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Home:
    """A rule of the table at one layer and expert."""

    rule: Rule
    layer: int = 0
    expert: int = 0


@cache
def homes(architecture: str, dims: ModelDims) -> dict[str, tuple[Home, ...]]:
    """Return name → homes of every tensor of the Hugging Face checkpoint, in the table's order.

    A tied embedding has two homes: the last pipeline stage keeps its own copy.
    """
    found: dict[str, tuple[Home, ...]] = {}
    rules = [rule for rule in FAMILIES[architecture] if rule.when(dims)]
    for rule in (r for r in rules if r.stage == "first"):
        found[rule.tensor] = (Home(rule),)
    for layer in range(dims.layers):
        for rule in (r for r in rules if r.stage == "layer"):
            for expert in range(dims.experts if rule.of_experts else 1):
                found[rule.tensor.format(layer=layer, expert=expert)] = (Home(rule, layer, expert),)
    for rule in (r for r in rules if r.stage.startswith("last")):
        found[rule.tensor] = (*found.get(rule.tensor, ()), Home(rule))
    return found


def tensor_shapes(architecture: str, dims: ModelDims) -> dict[str, Shape]:
    """Return name → shape of every tensor of the Hugging Face checkpoint, in the table's order."""
    return {name: found[0].rule.shape(dims) for name, found in homes(architecture, dims).items()}


def layout(architecture: str, dims: ModelDims, sizes: ParallelSizes, at: Coordinates, naming: str = "local") -> Layout:
    """Return what the rank at these coordinates holds. Parameter names number layers and experts from the first that it holds.

    A rank with several model chunks prefixes each name with its chunk, `model0.`, `model1.`, …, as Megatron's checkpoints do.
    """
    pieces: list[Piece] = []
    shapes: dict[str, Shape] = {}
    padding: dict[str, int] = {}
    experts: set[str] = set()
    for rule in FAMILIES[architecture]:
        if not rule.when(dims):
            continue
        ways, share = (sizes.expert_tensor_size, at.expert_tensor) if rule.of_experts else (sizes.tensor, at.tensor)
        shape, axis = rule.shape(dims), rule.shard_rule.axis
        local_shape = _replace(shape, axis, rule.shard_rule.local_extent(dims, ways))
        ranges = rule.shard_rule.ranges(dims, ways, share)
        boxes = [(slab(shape, axis, r.start, r.length), slab(local_shape, axis, r.local, r.length)) for r in ranges]
        for prefix, there, here in _occurrences(rule, dims, sizes, at):
            parameter = prefix + rule.parameter_name(naming).format(**here)
            tensor = rule.tensor.format(**there)
            shapes[parameter] = local_shape
            pieces += [Piece(tensor, box, parameter, local) for box, local in boxes]
            if rule.of_experts:
                experts.add(parameter)
            if rule.shard_rule.padded:
                padding[parameter] = (local_shape[axis] - sum(r.length for r in ranges)) * dims.hidden
    result = Layout(tuple(pieces), shapes, frozenset(experts))
    check_parameters_filled(result, padding)
    return result


def replica_layouts(architecture: str, dims: ModelDims, sizes: ParallelSizes, naming: str = "local") -> dict[int, Layout]:
    """Return rank → what it holds of the first copy of the model, proved to cover the model exactly once.

    The first copy of the experts' parameters is on the ranks whose `expert_data` is 0, that of all others on the ranks whose `data` and
    `context` are 0. With experts these may be different ranks; a rank that holds nothing of either is left out.
    """
    layouts = {}
    for rank in range(sizes.world):
        at = sizes.coordinates(rank)
        dense, experts = at.data == at.context == 0, dims.experts > 0 and at.expert_data == 0
        if dense or experts:
            layouts[rank] = _part(layout(architecture, dims, sizes, at, naming), dense, experts)
    check_exact_cover(layouts.values(), tensor_shapes(architecture, dims))
    return layouts


def _part(full: Layout, dense: bool, experts: bool) -> Layout:
    """Return a layout reduced to the parameters of experts, to all others, or to both."""
    names = {name for name in full.parameter_shapes if (experts if name in full.expert_parameters else dense)}
    return Layout(
        tuple(piece for piece in full.pieces if piece.parameter in names),
        {name: shape for name, shape in full.parameter_shapes.items() if name in names},
        full.expert_parameters & names,
    )


def _occurrences(
    rule: Rule, dims: ModelDims, sizes: ParallelSizes, at: Coordinates
) -> Iterator[tuple[str, dict[str, int], dict[str, int]]]:
    """Yield (prefix of the parameter, layer and expert in Hugging Face's names, in Megatron's) for each tensor that this rank holds."""
    layers = dims.layers // (sizes.pipeline * sizes.virtual)
    local_experts = dims.experts // sizes.expert if rule.of_experts else 1
    for chunk in range(sizes.virtual):
        prefix = f"model{chunk}." if sizes.virtual > 1 else ""
        first = at.pipeline == 0 and chunk == 0
        last = at.pipeline == sizes.pipeline - 1 and chunk == sizes.virtual - 1
        if rule.stage != "layer":
            if {"first": first, "last": last, "last_if_apart": last and not first}[rule.stage]:
                yield prefix, {}, {}
            continue
        # Chunk by chunk, the stages follow one another.
        before = (chunk * sizes.pipeline + at.pipeline) * layers
        for layer in range(layers):
            for expert in range(local_experts):
                yield (
                    prefix,
                    {"layer": before + layer, "expert": at.expert * local_experts + expert},
                    {"layer": layer, "expert": expert},
                )


def _replace(shape: Shape, axis: int, extent: int) -> Shape:
    return (*shape[:axis], extent, *shape[axis + 1 :])


def slab(shape: Shape, axis: int, start: int, length: int) -> Box:
    """Return the box of `length` indices of one axis, whole along the others."""
    return tuple((start, start + length) if i == axis else (0, extent) for i, extent in enumerate(shape))
