"""What a Hugging Face model directory describes, checked before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path

from megatron_aspo.errors import UserError
from megatron_aspo.weights.families import FAMILIES, tensor_shapes
from megatron_aspo.weights.layout import ModelDims


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
