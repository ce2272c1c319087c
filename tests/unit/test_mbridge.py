"""Our Megatron shards equal those of mbridge, an independent converter, bit for bit.

mbridge's own `load_weights` runs on the same Hugging Face files. It needs neither process group nor model for that: it reads on the first
tensor-parallel rank and scatters one part to each rank, and here the scatter is intercepted; it fills a stand-in with the names and
shapes of our files, and refuses names that it does not know.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from megatron_aspo.checkpoint.convert import convert, open_source
from megatron_aspo.weights.layout import ParallelSizes
from tests.unit.hf_shards import Model, bits, read_tensors, write_model

BASE = Model(layers=4, hidden=24, heads=12, kv_heads=4, head_dim=4, ffn=16, vocab=21)

CASES = [
    *(
        (replace(BASE, family=family, **changes), sizes)
        for family in ("qwen2", "llama", "qwen3")
        for changes, sizes in (
            ({}, ParallelSizes()),
            ({}, ParallelSizes(tensor=2)),
            ({}, ParallelSizes(tensor=4, data=2)),
            ({}, ParallelSizes(tensor=2, pipeline=2)),
            ({}, ParallelSizes(pipeline=4)),
            ({}, ParallelSizes(tensor=2, pipeline=2, virtual=2, data=2)),
            ({"kv_heads": 1}, ParallelSizes(tensor=2)),
            ({"kv_heads": 2}, ParallelSizes(tensor=4, pipeline=2)),
            ({"kv_heads": 3, "ffn": 18}, ParallelSizes(tensor=3)),
            ({"kv_heads": 12}, ParallelSizes(tensor=4)),
            ({"tied": True}, ParallelSizes(tensor=2)),
        )
    ),
    # mbridge's Llama has no parameter for the last stage's copy of a tied embedding.
    (replace(BASE, tied=True), ParallelSizes(tensor=2, pipeline=2)),
    *(
        (replace(BASE, family=family), sizes)
        for family in ("qwen3_moe", "mixtral")
        for sizes in (
            ParallelSizes(),
            ParallelSizes(tensor=2, pipeline=2),
            ParallelSizes(data=4, expert=4),
            ParallelSizes(tensor=2, data=2, expert=2),
            ParallelSizes(tensor=2, data=4, expert=2, expert_tensor=4),
            ParallelSizes(tensor=4, pipeline=2, virtual=2, expert=4, expert_tensor=1),
        )
    ),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("model", "sizes"), CASES)
def test_every_parameter_of_every_rank_equals_mbridges(tmp_path, monkeypatch, model, sizes, dtype):
    write_model(tmp_path / "hf", model, dtype, files=2)
    convert(open_source(tmp_path / "hf"), tmp_path / "megatron", to="megatron", sizes=sizes, naming="transformer_engine")
    files = {int(file.stem.removeprefix("rank_")): load(file) for file in (tmp_path / "megatron" / "model").iterdir()}
    ways = sizes.expert_tensor_size if model.moe else 1
    compared = 0
    for stage in range(sizes.pipeline):
        for expert in range(sizes.expert):
            here = {rank: chunks for rank, chunks in files.items() if rank // (sizes.tensor * sizes.data) == stage}
            for chunk in range(sizes.virtual):
                held = {
                    rank: {name: t for name, t in chunks[chunk].items() if not is_expert(name) or rank // ways % sizes.expert == expert}
                    for rank, chunks in here.items()
                }
                shapes = {name: torch.empty_like(t) for parameters in held.values() for name, t in parameters.items()}
                first_layer = (chunk * sizes.pipeline + stage) * (model.layers // (sizes.pipeline * sizes.virtual))
                parts = mbridge_parts(tmp_path / "hf", model, sizes, dtype, shapes, first_layer, expert, monkeypatch)
                for rank, parameters in held.items():
                    for name, found in parameters.items():
                        expected = parts[name][rank % ways if is_expert(name) else rank % sizes.tensor]
                        assert found.shape == expected.shape and torch.equal(bits(found), bits(expected)), (rank, chunk, name)
                        compared += 1
    assert compared >= sum(len(chunk) for chunks in files.values() for chunk in chunks), "a parameter was left out"


def load(file: Path) -> list[dict[str, torch.Tensor]]:
    """Return the parameters of one rank, by model chunk."""
    everything = read_tensors(file.parent, file.name)
    if not any(name.startswith("model0.") for name in everything):
        return [everything]
    count = 1 + max(int(name.partition(".")[0].removeprefix("model")) for name in everything)
    prefixes = [f"model{chunk}." for chunk in range(count)]
    chunks = [{name.removeprefix(p): t for name, t in everything.items() if name.startswith(p)} for p in prefixes]
    assert sum(map(len, chunks)) == len(everything)
    return chunks


def is_expert(name: str) -> bool:
    return ".experts." in name


class Chunk(torch.nn.Module):
    """Stand-in for the model chunk that mbridge fills: parameters by name, layers that know their number in the whole model."""

    def __init__(self, parameters: dict[str, torch.Tensor], first_layer: int):
        super().__init__()
        self._parameters_by_name = parameters
        count = len({name.split(".")[2] for name in parameters if name.startswith("decoder.layers.")})
        self.decoder = SimpleNamespace(layers=[SimpleNamespace(layer_number=first_layer + i + 1) for i in range(count)])

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._parameters_by_name


def mbridge_parts(
    hf: Path,
    model: Model,
    sizes: ParallelSizes,
    dtype: torch.dtype,
    parameters: dict[str, torch.Tensor],
    first_layer: int,
    expert: int,
    monkeypatch,
) -> dict[str, list[torch.Tensor]]:
    """Return parameter → the part of each (expert) tensor-parallel rank, as mbridge splits it."""
    from mbridge.core.bridge import _MODEL_REGISTRY  # imported late: it takes seconds
    from mbridge.core.parallel_states import ParallelStates

    base = _MODEL_REGISTRY[model.family]

    class Bridge(base):
        def _build_config(self):
            """Return the fields of Megatron's config that the mapping reads."""
            return SimpleNamespace(gated_linear_unit=True, num_moe_experts=model.experts if model.moe else None)

    # mbridge changes the class's table for a tied model, and would keep the change for the next one.
    Bridge._DIRECT_MAPPING = dict(base._DIRECT_MAPPING)
    bridge = Bridge(
        AutoConfig.from_pretrained(hf),
        dtype,
        ParallelStates(tp_size=sizes.tensor, ep_size=sizes.expert, ep_rank=expert, etp_size=sizes.expert_tensor_size),
        make_vocab_size_divisible_by=sizes.tensor,
    )
    bridge.vocab_size, bridge.padded_vocab_size = model.vocab, -(-model.vocab // sizes.tensor) * sizes.tensor
    scattered: list[list[torch.Tensor]] = []
    monkeypatch.setattr(torch.distributed, "scatter", lambda output, parts, src, group: scattered.append(parts))
    monkeypatch.setattr(torch.distributed, "get_global_rank", lambda group, rank: rank)
    bridge.load_weights([Chunk(parameters, first_layer)], str(hf))
    return dict(zip(parameters, scattered, strict=True))
