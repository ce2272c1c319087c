"""Which ranks hold which boxes of each Hugging Face tensor: the two ends of a transfer, read off the table of families.

A side is asked tensor by tensor and never lists its ranks' whole layouts, so that a thousand ranks and fifty thousand experts' matrices
cost what the few kinds among them cost. Pure: no process group, no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from megatron_aspo.common.errors import UserError
from megatron_aspo.weights.cuts import Cut
from megatron_aspo.weights.families import VLLM_VOCAB_MULTIPLE, Home, Rule, homes, slab
from megatron_aspo.weights.layout import Box, LayoutError, ModelDims, ParallelSizes, padded_vocab

Ranks = tuple[int, ...]
_CPU_EXPERT_MULTIPLE = 32
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of an attention head for which vLLM 0.32 has CPU kernels (CPUAttentionBackend.get_supported_head_sizes)."""


@dataclass(frozen=True, eq=False)
class Held:
    """The boxes of one kind of tensor and who has each. One object per kind: two tensors are of a kind when theirs is the same object."""

    boxes: tuple[Box, ...]
    ranks: tuple[Ranks, ...]
    """Ascending, of each box."""


@dataclass(frozen=True)
class EngineSizes:
    """The workers of one side that generates. They are numbered tensor-parallel fastest, then engine."""

    tensor: int = 1
    expert_parallel: bool = False
    """The workers of an engine share the experts out whole, in order, and do not cut them."""
    engines: int = 1

    @property
    def world(self) -> int:
        return self.tensor * self.engines


class TrainingHoldings:
    """What the training ranks hold."""

    def __init__(self, architecture: str, dims: ModelDims, sizes: ParallelSizes):
        self.sizes, self.world = sizes, sizes.world
        self._dims, self._homes = dims, homes(architecture, dims)
        self._dense: dict[tuple[int, int], list[int]] = {}
        self._experts: dict[tuple[int, int, int], list[int]] = {}
        for rank in range(sizes.world):
            at = sizes.coordinates(rank)
            self._dense.setdefault((at.pipeline, at.tensor), []).append(rank)
            self._experts.setdefault((at.pipeline, at.expert, at.expert_tensor), []).append(rank)
        self._kind = cache(self._make)

    def of(self, tensor: str) -> Held:
        """Every element is in exactly one of the boxes."""
        places = [(home.rule, self.stage(home), self._expert_rank(home)) for home in self._homes[tensor]]
        return self._kind(tuple(places))

    def stage(self, home: Home) -> int:
        """The pipeline stage that holds it. A stage that is first and last has one copy of a tied embedding, and the table two rules."""
        if home.rule.stage == "layer":
            return home.layer // (self._dims.layers // (self.sizes.pipeline * self.sizes.virtual)) % self.sizes.pipeline
        return 0 if home.rule.stage == "first" else self.sizes.pipeline - 1

    def in_turns(self) -> list[str]:
        """All tensors, such that neighbours lie on different stages: the first layer of each stage, then the second of each, and so on.

        Stages send at the same time then. Tensors of a layer stay together, those outside the layers come first and last.
        """
        layers = self._dims.layers // self.sizes.pipeline
        per_chunk = layers // self.sizes.virtual

        def turn(tensor: str) -> tuple[int, int]:
            home = self._homes[tensor][0]
            if home.rule.stage != "layer":
                return (-1 if home.rule.stage == "first" else layers), 0
            chunk = home.layer // (per_chunk * self.sizes.pipeline)
            return chunk * per_chunk + home.layer % per_chunk, self.stage(home)

        return sorted(self._homes, key=turn)

    def _expert_rank(self, home: Home) -> int:
        return home.expert // (self._dims.experts // self.sizes.expert) if home.rule.of_experts else 0

    def _make(self, places: tuple[tuple[Rule, int, int], ...]) -> Held:
        return _merged([part for rule, stage, expert in places for part in self._parts(rule, stage, expert)])

    def _parts(self, rule: Rule, stage: int, expert: int) -> list[tuple[Box, list[int]]]:
        if rule.of_experts:
            ways = self.sizes.expert_tensor_size
            return _cut(rule, rule.cut, self._dims, ways, lambda share: self._experts[stage, expert, share])
        return _cut(rule, rule.cut, self._dims, self.sizes.tensor, lambda share: self._dense[stage, share])


class EngineHoldings:
    """What the workers of vLLM engines hold, by the rules of its loaders."""

    def __init__(self, architecture: str, dims: ModelDims, sizes: EngineSizes):
        """Raises UserError when the model cannot be cut this way."""
        check_engine(dims, sizes)
        self.sizes, self.world = sizes, sizes.world
        self._dims, self._homes = dims, homes(architecture, dims)
        self._kind = cache(self._make)

    def of(self, tensor: str) -> Held:
        home = self._homes[tensor][0]
        owner = -1
        if home.rule.of_experts and self.sizes.expert_parallel:
            # The first workers have one expert more where the number does not divide.
            each, more = divmod(self._dims.experts, self.sizes.tensor)
            owner = home.expert // (each + 1) if home.expert < more * (each + 1) else (home.expert - more) // each
        return self._kind(home.rule, owner)

    def _make(self, rule: Rule, owner: int) -> Held:
        if owner >= 0:
            whole = tuple((0, extent) for extent in rule.shape(self._dims))
            return Held((whole,), (tuple(self._workers(owner)),))
        return _merged(_cut(rule, rule.engine_cut or rule.cut, self._dims, self.sizes.tensor, self._workers))

    def _workers(self, place: int) -> list[int]:
        """Those in this place of their engine."""
        return [engine * self.sizes.tensor + place for engine in range(self.sizes.engines)]


def _cut(rule: Rule, cut: Cut, dims: ModelDims, ways: int, holders: Callable[[int], list[int]]) -> list[tuple[Box, list[int]]]:
    shape = rule.shape(dims)
    return [(slab(shape, cut.axis, run.start, run.length), holders(share)) for share in range(ways) for run in cut.runs(dims, ways, share)]


def _merged(parts: list[tuple[Box, list[int]]]) -> Held:
    """Ranks with one and the same box are its replicas."""
    ranks: dict[Box, set[int]] = {}
    for box, holders in parts:
        ranks.setdefault(box, set()).update(holders)
    boxes = sorted(ranks)
    return Held(tuple(boxes), tuple(tuple(sorted(ranks[box])) for box in boxes))


def check_engine(dims: ModelDims, sizes: EngineSizes) -> None:
    """Raise LayoutError when vLLM's workers cannot cut the model this way."""
    ways, padded = sizes.tensor, padded_vocab(dims.vocab, VLLM_VOCAB_MULTIPLE)
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
    """Raise UserError for what vLLM's kernels on `device` do not compute, or cannot be brought new weights for."""
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
            f"needs a multiple of {_CPU_EXPERT_MULTIPLE}, and pads what it cannot be given anew: lower it",
            tensor_parallel=sizes.tensor,
        )
