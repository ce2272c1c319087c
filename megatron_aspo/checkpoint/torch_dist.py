"""Megatron-Core's distributed checkpoint, `torch_dist`: whole tensors of the model, independent of the layout that writes or reads them.

TARGET/
  latest_checkpointed_iteration.txt   `release`, as Megatron-LM names a model without a training state, or the number of an iteration
  release/ or iter_0000010/
    metadata.json    the format's name and version
    common.pt        everything but tensors: here Megatron-LM's arguments that describe the model
    .metadata        the table of tensors and shards (torch_dist_table.py)
    __0_0.distcp     the shards
    huggingface/     config, tokenizer and the other small files of the model; our addition, unknown to Megatron
    hugging_face_sha256.json   the hash of each Hugging Face tensor; likewise

A parameter of all layers is one tensor with the layers on its first axis and, for experts, the experts on its second.
"""

import argparse
import functools
import io
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_aspo.checkpoint.megatron_files import LayoutReader
from megatron_aspo.checkpoint.torch_dist_table import read_table
from megatron_aspo.common.errors import UserError
from megatron_aspo.hf.model import HFModel
from megatron_aspo.hf.model_directory import LATEST
from megatron_aspo.hf.tensor_files import DTYPES, Reader
from megatron_aspo.hf.tensor_meta import torch_dtype
from megatron_aspo.hf.transfer import assemble
from megatron_aspo.weights.families import layout
from megatron_aspo.weights.layout import Box, Layout, ModelDims, ParallelSizes, overlap

HASHES = "hugging_face_sha256.json"
_CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")


@dataclass(frozen=True)
class _Location:
    """Location of a parameter of the whole model: the tensor `key`, at `index` along its leading axes, which have these `extents`."""

    key: str
    index: tuple[int, ...] = ()
    extents: tuple[int, ...] = ()


def _locate(parameter: str, dims: ModelDims, naming: str) -> _Location:
    """Return the location of a parameter, given by the local layers' name.

    Keys are those of Transformer Engine's layers, except for the norm before experts: with local layers Megatron-Core stores it under the
    name of the norm before a dense feed-forward network.
    """
    if (layer := _LAYER.fullmatch(parameter)) is None:
        return _Location(parameter)
    index, extents, rest = (int(layer[1]),), (dims.layers,), layer[2]
    if expert := _EXPERT.fullmatch(rest):
        return _Location(f"decoder.layers.mlp.experts.experts.{expert[2]}", (*index, int(expert[1])), (*extents, dims.experts))
    if rest == "input_layernorm.weight":
        rest = "self_attention.linear_qkv.layer_norm_weight"
    if rest == "pre_mlp_layernorm.weight" and not (dims.experts and naming == "transformer_engine"):
        rest = "mlp.linear_fc1.layer_norm_weight"
    return _Location(f"decoder.layers.{rest}", index, extents)


def _whole_model(model: HFModel) -> Layout:
    return layout(model.architecture, model.dims, ParallelSizes(), ParallelSizes().coordinates(0))


# --- reading ------------------------------------------------------------------------------------------------------------------------------


def read_hashes(directory: Path) -> dict[str, str]:
    """Return Hugging Face tensor → SHA-256; empty if Megatron wrote the checkpoint. Raises UserError for a damaged file."""
    path = directory / HASHES
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): the checkpoint cannot be trusted") from error


class TorchDistReader(LayoutReader):
    """Reads boxes of Hugging Face tensors from a `torch_dist` directory. Memory holds a few shards at a time."""

    def __init__(self, directory: Path, model: HFModel):
        """Read only the table. Raises UserError unless it has exactly the model's tensors, with their shapes."""
        super().__init__({0: _whole_model(model)})
        self._table = read_table(directory)
        self._locations = self._find_locations(directory, model)
        used = {location.key for location in self._locations.values()}
        for key in sorted(self._table.keys() - used):
            if key.startswith(_MODEL_KEYS):
                raise UserError(f"{directory} has the tensor {key}, which a {model.architecture} with its config.json does not have")
        types = {parameter: self._table[location.key].dtype for parameter, location in self._locations.items()}
        for key, dtype in ((self._locations[parameter].key, dtype) for parameter, dtype in types.items()):
            if dtype not in DTYPES.values():
                raise UserError(f"{directory}: {key} has element type {dtype}; expected one of {', '.join(DTYPES.values())}")
        self.dtypes = {piece.tensor: types[piece.parameter] for piece in self._layouts[0].pieces}
        """Element type of each tensor, as torch names it."""
        self._shard = functools.lru_cache(maxsize=4)(lambda shard: shard.read())

    def _find_locations(self, directory: Path, model: HFModel) -> dict[str, _Location]:
        locations = {}
        for parameter, shape in self._layouts[0].parameter_shapes.items():
            found = [_locate(parameter, model.dims, naming) for naming in ("local", "transformer_engine")]
            location = next((location for location in found if location.key in self._table), None)
            if location is None:
                raise UserError(f"{directory} lacks {found[0].key}, which a {model.architecture} has; is it this model's checkpoint?")
            expected, stored = (*location.extents, *shape), self._table[location.key].shape
            # Rows that pad the vocabulary may follow.
            rows = parameter.endswith(("word_embeddings.weight", "output_layer.weight")) and stored[0] >= expected[0]
            if stored != expected and not (rows and stored[1:] == expected[1:]):
                raise UserError(f"{directory}: {location.key} has shape {stored}; config.json says {expected}: another model's")
            locations[parameter] = location
        return locations

    def _local(self, rank: int, parameter: str, box: Box) -> torch.Tensor:
        location = self._locations[parameter]
        wanted = (*((i, i + 1) for i in location.index), *box)
        stored = self._table[location.key]
        result = torch.empty([stop - start for start, stop in wanted], dtype=getattr(torch, stored.dtype))
        found = 0
        for shard in stored.shards:
            if (shared := overlap(shard.box, wanted)) is None:
                continue
            values = self._shard(shard)[_slices(shared, shard.box)]
            found += values.numel()
            if values.shape == result.shape:
                result = values
            else:
                result[_slices(shared, wanted)] = values
        if found != result.numel():
            raise UserError(f"{stored.shards[0].file.parent}: the shards of {location.key} do not cover it exactly once")
        return result[(0,) * len(location.index)] if location.index else result


def _slices(box: Box, inside: Box) -> tuple[slice, ...]:
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(box, inside, strict=True))


# --- writing ------------------------------------------------------------------------------------------------------------------------------


def write_torch_dist(target: Path, model: HFModel, reader: Reader, dtype: str, naming: str) -> Path:
    """Write the model's tensors, cast to `dtype`, one at a time, into `target`, which exists; return the directory that holds them.

    naming: `local | transformer_engine`, the layer spec of the program that will read it.
    """
    directory = target / "release"
    directory.mkdir()
    planner = _Planner(model, reader, dtype, naming)
    # torch warns that a single process writes, which is intended.
    with warnings.catch_warnings(action="ignore", category=UserWarning), _without_checksums():
        save({}, storage_writer=FileSystemWriter(directory, sync_files=False), planner=planner, no_dist=True)
    arguments = argparse.Namespace(**_arguments(model, dtype))
    torch.save({"args": arguments, "checkpoint_version": 3.0, "iteration": 0}, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
    (target / LATEST).write_text("release", encoding="utf-8")
    return directory


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Make torch.save omit the CRC-32 of tensors: it takes 5 times as long as the rest of writing, and torch.load does not check it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Planner(DefaultSavePlanner):
    """Creates each tensor lazily, in the order of writing, so that the whole model is never in memory."""

    def __init__(self, model: HFModel, reader: Reader, dtype: str, naming: str):
        super().__init__(flatten_state_dict=False)
        whole, properties = _whole_model(model), TensorProperties(dtype=getattr(torch, dtype))
        self._items = []
        for parameter, shape in whole.parameter_shapes.items():
            location = _locate(parameter, model.dims, naming)
            ones, zeros = (1,) * len(location.index), (0,) * len(shape)
            offsets, sizes = torch.Size((*location.index, *zeros)), torch.Size((*ones, *shape))
            data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, torch.Size((*location.extents, *shape)))
            self._items.append(WriteItem(MetadataIndex(location.key, offsets), WriteItemType.SHARD, tensor_data=data))
        made = assemble(whole, reader, dict.fromkeys(whole.parameter_shapes, torch_dtype(dtype)))
        self._values = zip([*self._items], made, strict=True)
        self._items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in _extra_states(whole, model.dims, naming)]

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            empty = io.BytesIO()
            torch.save([None], empty)
            return empty
        item, (_, values) = next(self._values)
        if item.index != write_item.index:
            raise RuntimeError(f"torch asked for {write_item.index} when it was the turn of {item.index}")
        return values.view(item.tensor_data.chunk.sizes)


def _extra_states(whole: Layout, dims: ModelDims, naming: str) -> list[str]:
    """Return the keys of each module's FP8 state, which Megatron-Core requires by name and which is empty without FP8."""
    keys = {}
    for parameter in whole.parameter_shapes:
        module = parameter.rpartition(".")[0]
        location = _locate(parameter, dims, naming)
        # A norm inside a linear layer has no separate state.
        own = location.key.rpartition(".")[0] if "layer_norm" not in location.key.rpartition(".")[2] else ""
        modules = [own] if "linear_" in own or ("norm" in own and naming == "transformer_engine") else []
        if naming == "transformer_engine" and module.endswith("self_attention.linear_proj"):
            modules.append("decoder.layers.self_attention.core_attention")
        offset, shape = (".".join(map(str, numbers)) for numbers in (location.index or (0,), location.extents or (1,)))
        keys |= dict.fromkeys(f"{name}._extra_state/shard_{offset}_{shape}" for name in modules)
    return list(keys)


def _arguments(model: HFModel, dtype: str) -> dict[str, Any]:
    """Return Megatron-LM's arguments for this model, as `--use-checkpoint-args` reads them."""
    dims = model.dims
    arguments = {
        "num_layers": dims.layers,
        "hidden_size": dims.hidden,
        "ffn_hidden_size": dims.ffn,
        "num_attention_heads": dims.heads,
        "group_query_attention": dims.kv_heads != dims.heads,
        "num_query_groups": dims.kv_heads,
        "kv_channels": dims.head_dim,
        "seq_length": model.max_positions,
        "max_position_embeddings": model.max_positions,
        "position_embedding_type": "rope",
        "rotary_base": int(model.rope_theta),
        "rotary_percent": 1.0,
        "add_position_embedding": True,
        "normalization": "RMSNorm",
        "norm_epsilon": model.norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": dims.qkv_bias,
        "qk_layernorm": dims.qk_norm,
        "untie_embeddings_and_output_weights": not dims.tied,
        "vocab_size": dims.vocab,
        "padded_vocab_size": dims.vocab,
        "make_vocab_size_divisible_by": 1,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": getattr(torch, dtype),
        "ckpt_format": "torch_dist",
        "iteration": 0,
    }
    if dims.experts:
        arguments |= {
            "num_experts": dims.experts,
            "moe_ffn_hidden_size": dims.moe_ffn,
            "moe_router_topk": model.experts_per_token,
            "moe_router_pre_softmax": not model.norm_topk_prob,
            "moe_router_load_balancing_type": "none",
        }
    return arguments
