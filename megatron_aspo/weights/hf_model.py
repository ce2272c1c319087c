"""A Hugging Face model directory: where it is, what it describes, and its tensors, checked before anything is loaded."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_aspo.errors import UserError
from megatron_aspo.weights.families import FAMILIES, tensor_shapes
from megatron_aspo.weights.layout import Box, ModelDims

# Buffers that old checkpoints carry although every reader computes them.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class HFModel:
    """What a model directory describes."""

    directory: Path
    architecture: str
    dims: ModelDims
    rope_theta: float
    norm_eps: float
    max_positions: int
    tensor_shapes: dict[str, tuple[int, ...]]


def read_model(directory: Path) -> HFModel:
    """Read and check `config.json`. Raises UserError naming the setting that is not supported."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{directory}/config.json cannot be read: {str(error).strip().splitlines()[0]}") from error
    architecture = (config.architectures or ["none"])[0]
    if architecture not in FAMILIES:
        raise UserError(f"{directory}: architecture {architecture} is not supported; expected one of {sorted(FAMILIES)}")
    rope = dict(config.rope_parameters or {})
    unsupported = {
        "hidden_act": (config.hidden_act, ("silu", "swish")),
        "rope_type": (rope.get("rope_type", "default"), ("default",)),
        "use_sliding_window": (getattr(config, "use_sliding_window", False) or False, (False,)),
        "mlp_bias": (getattr(config, "mlp_bias", False), (False,)),
        "attention_bias": (getattr(config, "attention_bias", False), (False,)),
        "pretraining_tp": (getattr(config, "pretraining_tp", 1), (1, None)),
        "attention_dropout": (getattr(config, "attention_dropout", 0.0), (0.0,)),
    }
    for key, (value, supported) in unsupported.items():
        if value not in supported:
            raise UserError(f"{directory}/config.json: {key}={value} is not supported for {architecture}; expected {supported[0]}")
    dims = ModelDims(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
    )
    return HFModel(
        directory=directory,
        architecture=architecture,
        dims=dims,
        rope_theta=float(rope["rope_theta"]),
        norm_eps=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
        tensor_shapes=tensor_shapes(architecture, dims),
    )


class TensorReader:
    """Reads boxes of a model directory's tensors, whichever file holds them, without loading whole files."""

    def __init__(self, model: HFModel):
        """Opens nothing yet; raises UserError when tensors are missing, unknown, doubled or of the wrong shape."""
        self._files = _tensor_files(model.directory)
        expected = model.tensor_shapes
        if model.dims.tied and "lm_head.weight" in self._files:
            # Some exporters write the tied matrix twice; the embedding is the one that counts.
            self._files.pop("lm_head.weight")
        missing = [name for name in expected if name not in self._files]
        extra = [name for name in self._files if name not in expected and not name.endswith(_IGNORED_SUFFIXES)]
        if missing or extra:
            problem = f"lacks {missing[0]}" if missing else f"has the unknown tensor {extra[0]}"
            raise UserError(
                f"{model.directory} {problem} ({len(missing)} missing, {len(extra)} unknown); "
                f"expected the {len(expected)} tensors of a {model.architecture} with its config.json"
            )
        for file in sorted(set(self._files.values())):
            with _open(file) as handle:
                for name in handle.keys():  # noqa: SIM118 - safe_open is not a mapping
                    if name in expected and tuple(handle.get_slice(name).get_shape()) != expected[name]:
                        shape = tuple(handle.get_slice(name).get_shape())
                        raise UserError(f"{file.name}: {name} has shape {shape}; config.json says {expected[name]}")

    def read(self, wanted: list[tuple[str, Box]]) -> Iterator[tuple[str, Box, torch.Tensor]]:
        """Yields (name, box, tensor) for each request, file by file, in the file's dtype."""
        by_file: dict[Path, list[tuple[str, Box]]] = {}
        for name, box in wanted:
            by_file.setdefault(self._files[name], []).append((name, box))
        for file, requests in by_file.items():
            with _open(file) as handle:
                for name, box in requests:
                    yield name, box, handle.get_slice(name)[tuple(slice(*edge) for edge in box)]


@contextmanager
def _open(file: Path):
    try:
        handle = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); the file is damaged or incomplete, copy it again") from error
    with handle:
        yield handle


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name → file, from the index or the single file; checks the index against the files."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            claimed = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{index} is not a safetensors index: {error}") from error
        files = sorted({directory / name for name in claimed.values()})
    else:
        claimed = None
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory} has no .safetensors file; convert the model to safetensors first")
    found: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is named by {index.name} but missing; copy it again")
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118
                if name in found:
                    raise UserError(f"{name} stands in both {found[name].name} and {file.name}; keep one of them")
                found[name] = file
    return found
