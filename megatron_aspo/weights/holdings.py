"""Which training ranks hold which boxes of each Hugging Face tensor: one side of a weight transfer, read off the table of families.

Holdings answer for one tensor at a time and never list whole layouts, so that a thousand ranks and fifty thousand matrices of experts cost
as little as the few kinds among them. Pure: no process group, no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from megatron_aspo.weights.families import Home, Rule, Shape, homes, slab
from megatron_aspo.weights.layout import Box, ModelDims, ParallelSizes
from megatron_aspo.weights.shard_rules import ShardRule

Ranks = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class BoxOwners:
    """The boxes of one kind of tensor and the ranks that hold each. Tensors are of one kind when they share the same object."""

    boxes: tuple[Box, ...]
    ranks: tuple[Ranks, ...]
    """The ranks of each box, ascending."""


class TrainingHoldings:
    """Which boxes of each Hugging Face tensor each training rank holds."""

    def __init__(self, architecture: str, dims: ModelDims, sizes: ParallelSizes):
        self.sizes, self.world = sizes, sizes.world
        self._dims, self._homes = dims, homes(architecture, dims)
        self._dense: dict[tuple[int, int], list[int]] = {}
        self._experts: dict[tuple[int, int, int], list[int]] = {}
        for rank in range(sizes.world):
            at = sizes.coordinates(rank)
            self._dense.setdefault((at.pipeline, at.tensor), []).append(rank)
            self._experts.setdefault((at.pipeline, at.expert, at.expert_tensor), []).append(rank)
        self._owners = cache(self._make_owners)

    def of(self, tensor: str) -> BoxOwners:
        """Return the boxes of a tensor and the ranks that hold each. Every element is in exactly one box."""
        return self._owners(tuple((home.rule, self.stage(home), self._expert_rank(home)) for home in self._homes[tensor]))

    def stage(self, home: Home) -> int:
        """Return the pipeline stage that holds it. A stage that is first and last holds one copy of a tied embedding, under two rules."""
        if home.rule.stage == "layer":
            return home.layer // (self._dims.layers // (self.sizes.pipeline * self.sizes.virtual)) % self.sizes.pipeline
        return 0 if home.rule.stage == "first" else self.sizes.pipeline - 1

    def in_turns(self) -> list[str]:
        """Return all tensors, ordered so that all stages send at the same time: the first layer of each stage, then the second of each, …

        Tensors of a layer stay together; those outside the layers come first and last.
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

    def _make_owners(self, located: tuple[tuple[Rule, int, int], ...]) -> BoxOwners:
        """located: (rule, stage, expert-parallel rank) of each home of a tensor."""
        return merge_replicas([part for rule, stage, expert in located for part in self._boxes(rule, stage, expert)])

    def _boxes(self, rule: Rule, stage: int, expert: int) -> list[tuple[Box, list[int]]]:
        shape, shard_rule = rule.shape(self._dims), rule.shard_rule
        if rule.of_experts:
            ways = self.sizes.expert_tensor_size
            return boxes_of_shards(shape, shard_rule, self._dims, ways, lambda share: self._experts[stage, expert, share])
        return boxes_of_shards(shape, shard_rule, self._dims, self.sizes.tensor, lambda share: self._dense[stage, share])


def boxes_of_shards(
    shape: Shape, rule: ShardRule, dims: ModelDims, ways: int, holders: Callable[[int], list[int]]
) -> list[tuple[Box, list[int]]]:
    """Return every box of a tensor that is sharded `ways` ways, with the ranks that hold it; holders: shard → ranks."""
    return [
        (slab(shape, rule.axis, found.start, found.length), holders(share))
        for share in range(ways)
        for found in rule.ranges(dims, ways, share)
    ]


def merge_replicas(parts: list[tuple[Box, list[int]]]) -> BoxOwners:
    """Merge equal boxes: their ranks are replicas."""
    ranks: dict[Box, set[int]] = {}
    for box, holders in parts:
        ranks.setdefault(box, set()).update(holders)
    boxes = sorted(ranks)
    return BoxOwners(tuple(boxes), tuple(tuple(sorted(ranks[box])) for box in boxes))
