"""The table of layouts at which one optimizer step is compared with plain PyTorch in float64, and the error of such a step.

A line is a model and its layout, in the words of the start-up line: `qwen3 tied TP2 SP PP2`. The suite runs SUITE,
tools/prove/check_layouts.py runs all.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.models import rope_scaling
from tests.parallel.test_one_step import Case, Truth, make_case, relative_error

BAR = 1e-5
"""Upper bound of every error."""

SUITE = """
    qwen3     tied    TP2 SP
    qwen2     tied    TP2 SP PP2
    qwen2     tied    TP2 SP shared
    qwen2     tied    PP2 VPP2
    llama     untied  PP2 VPP2
    qwen2     tied    PP2 VPP2 DP2 distributed
    qwen2     tied    TP2 SP PP2 VPP2
    qwen2     tied    CP2
    qwen2     tied    CP2 shared
    qwen3     tied    TP2 SP CP2
    qwen2     tied    CP2 DP2
    qwen2     tied    CP2 DP2 distributed
    llama     untied  PP2 CP2
    qwen2     tied    PP2 VPP2 CP2
    llama     untied  TP2 SP rope=llama3
    qwen2     tied    CP2 shared rope=yarn
    mistral   untied  PP2 shared rope=linear
    qwen3_moe tied
    qwen3_moe tied    DP2 EP2
    mixtral   untied  DP2 EP2
    qwen3_moe tied    TP2 SP EP2 ETP1
    qwen3_moe tied    TP2 SP ETP1
    qwen3_moe tied    TP2 SP
    qwen3_moe tied    TP2 SP DP2 EP2
    qwen3_moe tied    DP4 EP2
    qwen3_moe tied    DP4 EP2 distributed
    qwen3_moe tied    CP2 EP2
    qwen3_moe tied    PP2 DP2 EP2
"""

# Each axis alone, in the families that the suite leaves out; then pairs of axes, and products over eight processes.
BEYOND = """
    llama     untied
    llama     untied  tokens=10000
    qwen2     tied    shared tokens=10000
    qwen2     tied    tokens=1
    mixtral   untied  shared
    qwen3     tied    recompute=selective
    llama     tied    recompute=full
    qwen3_moe tied    recompute=full tokens=10000

    llama     tied    TP2
    qwen2     untied  PP2
    qwen3     untied  DP2
    qwen3     tied    DP2 distributed tokens=10000
    llama     untied  CP2 tokens=10000
    mixtral   untied  TP2 SP tokens=10000
    qwen3     tied    TP2 SP shared recompute=selective
    qwen3     tied    PP2 VPP2 recompute=full
    llama     untied  CP2 shared recompute=full
    mixtral   untied  DP2 EP2 recompute=full

    llama     untied  TP4
    qwen3     tied    TP4 SP tokens=10000
    qwen2     untied  PP4
    llama     tied    PP4 VPP2 layers=8
    qwen2     tied    CP4 shared
    qwen3     tied    DP4 distributed tokens=1
    qwen2     untied  TP2 PP2 shared recompute=full
    llama     untied  TP2 DP2 distributed recompute=selective
    qwen3     tied    PP2 CP2 tokens=1
    mixtral   untied  DP4 EP4 distributed
    qwen3_moe tied    CP4 EP4 ETP1 tokens=10000
    qwen3_moe tied    PP2 VPP2 DP2 EP2 shared

    llama     untied  TP2 SP PP2 DP2 distributed shared
    qwen3     tied    TP2 SP PP2 CP2 tokens=10000
    qwen2     tied    TP2 SP PP2 VPP2 CP2 shared recompute=full
    qwen3     untied  TP2 SP PP2 VPP2 DP2 distributed recompute=selective
    qwen2     tied    TP2 SP CP2 DP2 shared tokens=10000
    llama     tied    PP2 VPP2 CP2 DP2 distributed tokens=10000
    qwen2     tied    TP4 SP PP2
    llama     untied  PP4 CP2 recompute=full
    qwen3_moe tied    TP2 SP PP2 DP2 EP2
    qwen3_moe tied    TP2 SP PP2 VPP2 CP2 EP2 ETP1 shared
    qwen3_moe tied    TP2 SP CP2 DP2 EP4 ETP1 recompute=full
    mixtral   untied  PP2 CP2 DP2 EP4 distributed tokens=10000
    mixtral   untied  PP2 VPP2 TP2 SP DP2 EP2 distributed recompute=full
    qwen3_moe tied    DP8 EP8 experts=8
"""

_SIZES = {
    "TP": "tensor_parallel",
    "PP": "pipeline_parallel",
    "VPP": "virtual_pipeline",
    "CP": "context_parallel",
    "DP": "data_parallel",
    "EP": "expert_parallel",
    "ETP": "expert_tensor_parallel",
}
_SWITCHES = {"SP": "sequence_parallel", "distributed": "distributed_optimizer", "shared": "shared_prompts"}
_MODEL = {"layers": "num_hidden_layers", "experts": "num_experts"}
# Samples at which no choice of experts is close; `make_case` asserts it.
_SEEDS = {"qwen3_moe": 1}


@dataclass(frozen=True)
class LayoutCase:
    """One line of the table."""

    name: str
    """The line, with single spaces."""
    family: str
    tied: bool
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainerOptions."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's configuration."""

    @property
    def model(self) -> str:
        """The name of the model; cases of one model take the same step."""
        return " ".join([*self.name.split()[:2], *(f"{name}={value}" for name, value in self.overrides.items())])

    @property
    def processes(self) -> int:
        return int(np.prod([self.options.get(f"{axis}_parallel", 1) for axis in ("tensor", "pipeline", "context", "data")]))

    def make(self, directory: Path) -> Case:
        """Save the model and make its samples."""
        return make_case(directory, self.family, tied=self.tied, seed=_SEEDS.get(self.family, 0), **self.overrides)


def read_table(table: str) -> list[LayoutCase]:
    """Return the cases. Raises ValueError naming a word that the table does not know."""
    return [_read_line(line.split()) for line in table.splitlines() if line.strip()]


def _read_line(words: list[str]) -> LayoutCase:
    family, tying, *layout = words
    options: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    for word in layout:
        size, value = re.fullmatch(r"([A-Z]+)(\d+)", word), word.partition("=")[2]
        if size:
            options[_SIZES[size[1]]] = int(size[2])
        elif word in _SWITCHES:
            options[_SWITCHES[word]] = True
        elif word.startswith("tokens="):
            options["micro_batch_tokens"] = int(value)
        elif word.startswith("recompute="):
            options["recompute"] = value
        elif word.startswith("rope="):
            overrides |= rope_scaling(value)
        elif word.partition("=")[0] in _MODEL:
            overrides[_MODEL[word.partition("=")[0]]] = int(value)
        else:
            raise ValueError(f"{' '.join(words)}: {word!r} is no word of the table")
    return LayoutCase(" ".join(words), family, {"tied": True, "untied": False}[tying], options, overrides)


def differences(results: list[dict], true: Truth) -> dict[str, float]:
    """Return the errors of one step's results, by rank. Everything is relative, except for log-probabilities, in nats.

    Gradients and weights by tensor: largest difference over largest value. With the distributed optimizer each rank has only its shard of
    the gradient: there are no gradients then, and norm and weights replace them. Raises ValueError where a result is not a number.
    """
    first, last = results[0], results[-1]
    total, count = last["tally"]["loss"]
    if abs(count - 1) > 1e-6:
        raise ValueError(f"the replicas' shares of the loss come to {count} of it")
    found = {
        "weights": relative_error(first["weights"], true.weights),
        "norm": max(abs(result["norm"] / true.norm - 1) for result in results),
        "loss": abs(total / count - true.loss) / true.mean_token_loss,
        "logprobs": float(np.abs(last["logprobs"] - true.logprobs).max()),
    }
    if first["gradients"] is not None:
        found = {"gradients": relative_error(first["gradients"], true.gradients)} | found
    if not np.isfinite(list(found.values())).all():
        raise ValueError(f"not a number: {found}")
    return found
