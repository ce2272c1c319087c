"""How vLLM spreads the tensors of a Hugging Face model over the workers of its engines, by the rules of its loaders.

Pure: no vLLM, no torch, no process group, so that planning and training ranks may import it. The rules are compared with what vLLM's own
loaders put into each worker (tests/parallel/test_engine_holdings.py).
"""

from dataclasses import dataclass
from functools import cache

from megatron_aspo.common.errors import UserError
from megatron_aspo.weights.families import Rule, homes
from megatron_aspo.weights.holdings import BoxOwners, boxes_of_shards, merge_replicas
from megatron_aspo.weights.layout import LayoutError, ModelDims, padded_vocab
from megatron_aspo.weights.shard_rules import Extent, IndexRange, ShardRule, vocab_rows

VOCAB_MULTIPLE = 64
"""vLLM pads the vocabulary to a multiple of this before it shards it (DEFAULT_VOCAB_PADDING_SIZE)."""
_CPU_EXPERT_MULTIPLE = 32
"""The CPU kernel for experts needs a multiple of this many feed-forward channels per worker."""
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Attention head sizes for which vLLM 0.32 has CPU kernels (CPUAttentionBackend.get_supported_head_sizes)."""


@dataclass(frozen=True)
class EngineSizes:
    """The parallel sizes of all engines. Workers are numbered tensor-parallel rank fastest, then engine."""

    tensor: int = 1
    expert_parallel: bool = False
    """Each worker of an engine holds whole experts, distributed in order, instead of a shard of every expert."""
    engines: int = 1

    @property
    def world(self) -> int:
        """The number of workers of all engines."""
        return self.tensor * self.engines


def head_rows(heads: Extent) -> ShardRule:
    """Shard rows by whole heads, equally many for each worker; with fewer heads than workers, several workers hold the same head."""

    def ranges(d: ModelDims, size: int, rank: int) -> list[IndexRange]:
        return [IndexRange(rank * heads(d) // size * d.head_dim, 0, extent(d, size))]

    def extent(d: ModelDims, size: int) -> int:
        return max(heads(d) // size, 1) * d.head_dim

    return ShardRule(ranges, extent)


_OWN_RULES = {
    "embed_tokens": vocab_rows(VOCAB_MULTIPLE),
    "lm_head": vocab_rows(VOCAB_MULTIPLE),
    "q_proj": head_rows(lambda d: d.heads),
    "k_proj": head_rows(lambda d: d.kv_heads),
    "v_proj": head_rows(lambda d: d.kv_heads),
}
"""Module of a Hugging Face tensor → vLLM's rule. All other tensors are sharded as Megatron shards them."""


def _engine_rule(rule: Rule) -> ShardRule:
    return _OWN_RULES.get(rule.tensor.split(".")[-2], rule.shard_rule)


class EngineHoldings:
    """The boxes of each Hugging Face tensor that the workers of all engines hold."""

    def __init__(self, architecture: str, dims: ModelDims, sizes: EngineSizes):
        """Raises LayoutError when vLLM cannot shard the model this way."""
        check_engine(dims, sizes)
        self.sizes, self.world = sizes, sizes.world
        self._dims, self._homes = dims, homes(architecture, dims)
        self._owners = cache(self._make_owners)

    def of(self, tensor: str) -> BoxOwners:
        """Return the boxes of a tensor and the workers that hold each."""
        home = self._homes[tensor][0]
        tensor_rank = -1
        if home.rule.of_experts and self.sizes.expert_parallel:
            # The first workers hold one expert more where the experts do not divide evenly.
            each, more = divmod(self._dims.experts, self.sizes.tensor)
            tensor_rank = home.expert // (each + 1) if home.expert < more * (each + 1) else (home.expert - more) // each
        return self._owners(home.rule, tensor_rank)

    def _make_owners(self, rule: Rule, tensor_rank: int) -> BoxOwners:
        """tensor_rank: the one that holds the whole tensor; -1: all hold a shard."""
        if tensor_rank >= 0:
            whole = tuple((0, extent) for extent in rule.shape(self._dims))
            return BoxOwners((whole,), (tuple(self._workers(tensor_rank)),))
        return merge_replicas(boxes_of_shards(rule.shape(self._dims), _engine_rule(rule), self._dims, self.sizes.tensor, self._workers))

    def _workers(self, tensor_rank: int) -> list[int]:
        """Return the workers with this tensor-parallel rank, one of each engine."""
        return [engine * self.sizes.tensor + tensor_rank for engine in range(self.sizes.engines)]


def check_engine(dims: ModelDims, sizes: EngineSizes) -> None:
    """Raise LayoutError when vLLM's workers cannot shard the model this way."""
    ways, padded = sizes.tensor, padded_vocab(dims.vocab, VOCAB_MULTIPLE)
    rules = [
        (f"{dims.heads} attention heads", dims.heads % ways == 0),
        (f"{dims.kv_heads} key-value heads, nor is it a multiple of them", 0 in (dims.kv_heads % ways, ways % dims.kv_heads)),
        (f"{dims.ffn} feed-forward channels", bool(dims.experts) or dims.ffn % ways == 0),
        (f"{dims.moe_ffn} feed-forward channels of an expert", sizes.expert_parallel or dims.moe_ffn % ways == 0),
        (f"{padded} rows of the padded vocabulary", padded % ways == 0),
    ]
    for what, fits in rules:
        if not fits:
            raise LayoutError(f"{{tensor_parallel}} does not divide the model's {what}", tensor_parallel=ways)
    if sizes.expert_parallel and not dims.experts:
        raise LayoutError("{expert_parallel}: this model has no experts; set it to false", expert_parallel=True)
    if sizes.expert_parallel and dims.experts < ways:
        raise LayoutError(f"{{tensor_parallel}} workers cannot share out {dims.experts} experts", tensor_parallel=ways)


def check_engine_on(device: str, dims: ModelDims, sizes: EngineSizes) -> None:
    """Raise UserError for what vLLM's kernels on `device` do not compute, or for weights that they cannot be given again."""
    if device != "cpu":
        return
    if dims.head_dim not in CPU_HEAD_SIZES:
        raise UserError(
            f"the model's attention heads have {dims.head_dim} channels, for which vLLM has no CPU kernel; it has those for "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}: take another model, or run on GPUs"
        )
    if not dims.experts:
        return
    if sizes.expert_parallel:
        raise LayoutError(
            "{expert_parallel}: vLLM's CPU kernel takes every expert to be on each worker; set it to false", expert_parallel=True
        )
    if dims.moe_ffn // sizes.tensor % _CPU_EXPERT_MULTIPLE:
        raise LayoutError(
            f"{{tensor_parallel}} leaves a worker {dims.moe_ffn // sizes.tensor} feed-forward channels of an expert; vLLM's CPU kernel "
            f"needs a multiple of {_CPU_EXPERT_MULTIPLE}, and pads other sizes, whose weights could not be updated: lower it",
            tensor_parallel=sizes.tensor,
        )
