"""The description of a Hugging Face model directory, checked before anything is loaded."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.import_path import one_line
from megatron_aspo.weights.families import FAMILIES, tensor_shapes
from megatron_aspo.weights.layout import ModelDims
from megatron_aspo.weights.rope import RopeScaling, read_rope_scaling


@dataclass(frozen=True)
class HFModel:
    """The description of a model directory."""

    directory: Path
    architecture: str
    dims: ModelDims
    rope_theta: float
    norm_eps: float
    max_positions: int
    tensor_shapes: dict[str, tuple[int, ...]]
    experts_per_token: int = 0
    norm_topk_prob: bool = True
    """Whether the weights of a token's experts are divided by their sum."""
    rope_scaling: RopeScaling | None = None
    """None: the rotary frequencies follow from `rope_theta`."""

    @property
    def pair_cost(self) -> float:
        """The cost of attention between two tokens relative to all other cost of a token, in floating-point operations:
        4 · layers · heads · head dimension over 2 · the parameters that a token passes through.
        """
        dims = self.dims
        share = self.experts_per_token / dims.experts if dims.experts else 1.0
        looked_up = () if dims.tied else ("model.embed_tokens.weight",)
        met = sum(math.prod(s) * (share if ".experts." in name else 1.0) for name, s in self.tensor_shapes.items() if name not in looked_up)
        return 2 * dims.layers * dims.heads * dims.head_dim / met


_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
    "SeedOssForCausalLM": "seed_oss",
}
"""The `model_type` of each architecture: transformers chooses the class that reads the rest of the config by it."""


def read_sizes(directory: Path) -> tuple[str, ModelDims]:
    """Return architecture and sizes, which determine the shapes of all tensors. Whether the model can be trained is not checked."""
    config, architecture = _read_config(directory)
    return architecture, _dims(config, architecture)


def _read_config(directory: Path) -> tuple[Any, str]:
    """Return `config.json` and its architecture. Raises UserError for one that cannot be read or is not in the table."""
    from transformers import AutoConfig
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the settings that it warns of are refused here, in one line
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{directory}/config.json cannot be read: {one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    architecture = (config.architectures or ["none"])[0]
    if architecture not in FAMILIES:
        raise UserError(f"{directory}: architecture {architecture} is not supported; expected one of {sorted(FAMILIES)}")
    return config, architecture


def read_model(directory: Path) -> HFModel:
    """Read and check `config.json`. Raises UserError naming the setting that is not supported."""
    config, architecture = _read_config(directory)
    for key, value, supported in _settings(config, architecture):
        if value not in supported:
            raise UserError(f"{directory}/config.json: {key}={value} is not supported for {architecture}; expected {supported[0]}")
    dims = _dims(config, architecture)
    if dims.heads % dims.kv_heads:
        raise UserError(f"{directory}/config.json: num_key_value_heads={dims.kv_heads} does not divide num_attention_heads={dims.heads}")
    norm_topk_prob = bool(getattr(config, "norm_topk_prob", True))
    if dims.moe_ffn:
        if not dims.experts:
            raise UserError(f"{directory}/config.json: num_local_experts=0 is not supported for {architecture}; expected 1 or more")
        _check_top_k(directory, config.num_experts_per_tok, dims.experts, norm_topk_prob)
    rope_scaling = read_rope_scaling(config, f"{directory}/config.json")
    longest = rope_scaling.longest if rope_scaling else None
    return HFModel(
        directory=directory,
        architecture=architecture,
        dims=dims,
        rope_theta=float(config.rope_parameters["rope_theta"]),
        norm_eps=config.rms_norm_eps,
        max_positions=min(config.max_position_embeddings, longest or config.max_position_embeddings),
        tensor_shapes=tensor_shapes(architecture, dims),
        experts_per_token=config.num_experts_per_tok if dims.experts else 0,
        norm_topk_prob=norm_topk_prob,
        rope_scaling=rope_scaling,
    )


def _settings(config: Any, architecture: str) -> list[tuple[str, Any, tuple]]:
    """Return (setting, its value, the supported values) for every setting that transformers or vLLM reads in these families."""
    rope = dict(config.rope_parameters or {})
    settings = [
        ("model_type", config.model_type, (_MODEL_TYPES[architecture],)),
        ("quantization_config", getattr(config, "quantization_config", None), (None,)),
        ("hidden_act", config.hidden_act, ("silu", "swish")),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,)),
        ("use_sliding_window", getattr(config, "use_sliding_window", False) or False, (False,)),
        ("layer_types", sorted(set(getattr(config, "layer_types", None) or ["full_attention"])), (["full_attention"],)),
        ("dual_chunk_attention_config", getattr(config, "dual_chunk_attention_config", None), (None,)),
        ("mlp_bias", getattr(config, "mlp_bias", False), (False,)),
        ("pretraining_tp", getattr(config, "pretraining_tp", 1), (1, None)),
    ]
    if architecture == "SeedOssForCausalLM":
        # Its dropout is of pretraining: the policy that engines sample from, whose log-probabilities count, has none.
        settings.append(("attention_out_bias", config.attention_out_bias, (False,)))
    else:
        settings.append(("attention_bias", getattr(config, "attention_bias", False), (False,)))
        settings.append(("attention_dropout", getattr(config, "attention_dropout", 0.0), (0.0,)))
    if architecture == "Qwen3MoeForCausalLM":
        settings += [
            ("decoder_sparse_step", config.decoder_sparse_step, (1,)),
            ("mlp_only_layers", config.mlp_only_layers, ([],)),
            ("shared_expert_intermediate_size", getattr(config, "shared_expert_intermediate_size", None) or None, (None,)),
        ]
    if architecture in ("MistralForCausalLM", "MixtralForCausalLM"):
        # A window as long as the longest sequence has no effect.
        window = config.sliding_window
        idle = window is None or window >= config.max_position_embeddings
        settings.append(("sliding_window", None if idle else window, (None,)))
    if architecture == "MixtralForCausalLM":
        settings.append(("router_jitter_noise", config.router_jitter_noise, (0.0,)))
    return settings


def _dims(config: Any, architecture: str) -> ModelDims:
    moe = architecture in ("Qwen3MoeForCausalLM", "MixtralForCausalLM")
    return ModelDims(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=architecture == "Qwen2ForCausalLM" or (architecture == "SeedOssForCausalLM" and config.attention_bias),
        qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        experts=config.num_experts if moe else 0,
        # Mixtral has no dense layer: its intermediate_size is an expert's.
        moe_ffn=getattr(config, "moe_intermediate_size", config.intermediate_size) if moe else 0,
    )


def _check_top_k(directory: Path, top_k: int, experts: int, norm_topk_prob: bool) -> None:
    # With a single expert, whose weight is divided by itself, the router has no gradient, and Megatron refuses it.
    least = 2 if norm_topk_prob else 1
    if not least <= top_k <= experts:
        raise UserError(
            f"{directory}/config.json: num_experts_per_tok={top_k} is not supported with {experts} experts and "
            f"norm_topk_prob={norm_topk_prob}; expected {least} to {experts}"
        )
