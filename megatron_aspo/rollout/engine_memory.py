"""Where a worker of a vLLM engine keeps the elements of Hugging Face tensors: where to look to see what it has in its memory.

vLLM's models stack what multiplies the same input: queries, keys and values; gate and up; and all experts of a worker. Everything else
has the checkpoint's name, and the shape of this worker's part. Pure: no vLLM, no torch.
"""

import re
from dataclasses import dataclass

from megatron_aspo.sync.schedule import TransferSpec
from megatron_aspo.weights.holdings import EngineHoldings
from megatron_aspo.weights.layout import Box

_STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""vLLM's module → those of the checkpoint, whose rows follow each other in it."""
_EXPERT = re.compile(r"(?P<room>.*\.experts)\.(?P<number>\d+)\.(?P<projection>\w+)\.weight")
_EXPERT_PARTS = {
    **dict.fromkeys(("gate_proj", "w1"), ("w13", 0)),
    **dict.fromkeys(("up_proj", "w3"), ("w13", 1)),
    **dict.fromkeys(("down_proj", "w2"), ("w2", 0)),
}
"""Matrix of an expert → vLLM's parameter, and whether it is the first or the second in it."""


@dataclass(frozen=True)
class Place:
    """A part of a parameter of vLLM's model."""

    parameter: str
    box: Box
    expert: int | None = None
    """Index along the parameter's first axis, which `box` then leaves out."""


class EngineMemory:
    """The memory of one worker."""

    def __init__(self, spec: TransferSpec, worker: int):
        """worker: its number among the workers of all engines. Raises UserError when engines cannot cut the model as the spec says."""
        self._holdings = EngineHoldings(spec.architecture, spec.dims, spec.engines)
        self._worker = worker

    def held(self, tensor: str) -> Box | None:
        """The part of a tensor that this worker has, if any."""
        held = self._holdings.of(tensor)
        boxes = [box for box, ranks in zip(held.boxes, held.ranks, strict=True) if self._worker in ranks]
        if len(boxes) > 1:
            raise ValueError(f"worker {self._worker} holds {len(boxes)} boxes of {tensor}: where they lie in its memory is not known")
        return boxes[0] if boxes else None

    def place(self, tensor: str, box: Box) -> Place:
        """Where a box lies, all of which this worker holds."""
        own = self.held(tensor)
        local = tuple((start - begin, stop - begin) for (start, stop), (begin, _) in zip(box, own, strict=True))
        expert = _EXPERT.fullmatch(tensor)
        if expert is not None:
            return self._expert_place(expert, local, own)
        for stacked, parts in _STACKED.items():
            for part in parts:
                if f".{part}." in tensor:
                    before = parts[: parts.index(part)]
                    rows = sum(_rows(self.held(tensor.replace(f".{part}.", f".{other}."))) for other in before)
                    return Place(tensor.replace(f".{part}.", f".{stacked}."), _lower(local, rows))
        return Place(tensor, local)

    def _expert_place(self, found: re.Match, local: Box, own: Box) -> Place:
        stacked, part = _EXPERT_PARTS[found["projection"]]
        earlier = (f"{found['room']}.{number}.{found['projection']}.weight" for number in range(int(found["number"])))
        index = sum(self.held(other) is not None for other in earlier)
        return Place(f"{found['room']}.routed_experts.{stacked}_weight", _lower(local, part * _rows(own)), index)


def _rows(box: Box) -> int:
    return box[0][1] - box[0][0]


def _lower(box: Box, rows: int) -> Box:
    """The same box, so many rows further down."""
    (start, stop), *others = box
    return ((start + rows, stop + rows), *others)
