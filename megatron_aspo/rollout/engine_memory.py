"""The parameters of vLLM's model in which a worker keeps the elements of Hugging Face tensors, so that they can be read back.

vLLM's models stack matrices that multiply the same input: queries, keys and values; gate and up; and all experts of a worker. Every other
parameter has the checkpoint's name, and the shape of this worker's part. Pure: no vLLM, no torch.
"""

import re
from dataclasses import dataclass

from megatron_aspo.rollout.engine_layout import EngineHoldings
from megatron_aspo.weights.layout import Box

_STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""vLLM's module → the checkpoint's modules whose rows follow one another in it."""
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<projection>\w+)\.weight")
_EXPERT_PARTS = {
    **dict.fromkeys(("gate_proj", "w1"), ("w13", 0)),
    **dict.fromkeys(("up_proj", "w3"), ("w13", 1)),
    **dict.fromkeys(("down_proj", "w2"), ("w2", 0)),
}
"""Matrix of an expert → vLLM's parameter, and its position in it."""


@dataclass(frozen=True)
class StoredBox:
    """A box of a parameter of vLLM's model."""

    parameter: str
    box: Box
    expert: int | None = None
    """Index along the parameter's first axis, which `box` then omits."""


class EngineMemory:
    """The layout of the memory of one worker."""

    def __init__(self, holdings: EngineHoldings, worker: int):
        """worker: its number among the workers of all engines."""
        self._holdings, self._worker = holdings, worker

    def own_box(self, tensor: str) -> Box | None:
        """Return the part of a tensor that this worker holds, if any."""
        owners = self._holdings.of(tensor)
        boxes = [box for box, ranks in zip(owners.boxes, owners.ranks, strict=True) if self._worker in ranks]
        if len(boxes) > 1:
            raise ValueError(f"worker {self._worker} holds {len(boxes)} boxes of {tensor}: where they lie in its memory is unknown")
        return boxes[0] if boxes else None

    def locate(self, tensor: str, box: Box) -> StoredBox:
        """Return where a box lies that this worker holds entirely."""
        own = self._held_box(tensor)
        local = tuple((start - begin, stop - begin) for (start, stop), (begin, _) in zip(box, own, strict=True))
        expert = _EXPERT.fullmatch(tensor)
        if expert is not None:
            return self._locate_expert(expert, local, own)
        for stacked, parts in _STACKED.items():
            for part in parts:
                if f".{part}." in tensor:
                    before = parts[: parts.index(part)]
                    rows = sum(_rows(self._held_box(tensor.replace(f".{part}.", f".{other}."))) for other in before)
                    return StoredBox(tensor.replace(f".{part}.", f".{stacked}."), _shift_down(local, rows))
        return StoredBox(tensor, local)

    def _held_box(self, tensor: str) -> Box:
        """Return `own_box` of a tensor of which this worker must hold a part."""
        own = self.own_box(tensor)
        if own is None:
            raise ValueError(f"worker {self._worker} holds nothing of {tensor}")
        return own

    def _locate_expert(self, found: re.Match, local: Box, own: Box) -> StoredBox:
        stacked, part = _EXPERT_PARTS[found["projection"]]
        earlier = (f"{found['experts']}.{number}.{found['projection']}.weight" for number in range(int(found["number"])))
        index = sum(self.own_box(other) is not None for other in earlier)
        return StoredBox(f"{found['experts']}.routed_experts.{stacked}_weight", _shift_down(local, part * _rows(own)), index)


def _rows(box: Box) -> int:
    return box[0][1] - box[0][0]


def _shift_down(box: Box, rows: int) -> Box:
    """Return the box this many rows further down."""
    (start, stop), *others = box
    return ((start + rows, stop + rows), *others)
