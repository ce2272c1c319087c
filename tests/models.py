"""Small random models in Hugging Face format, for tests that need a real one.

Head dimension 32 or more: vLLM's CPU attention has no kernel for 16.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "llama": {"head_dim": 32},
    "mistral": {"head_dim": 32, "sliding_window": None},
    "seed_oss": {"head_dim": 64, "attention_bias": True},
    "qwen3_moe": {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "mixtral": {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
}

ROPE_SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}
"""Settings of rotary embeddings by type, with an original length at which the tiny models have frequencies in every band."""


def rope_scaling(kind: str, **changes: Any) -> dict[str, Any]:
    """Return overrides of `save_tiny` for this type of scaled rotary embeddings (a key of ROPE_SCALINGS)."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **ROPE_SCALINGS[kind], **changes}}


def save_tiny(
    family: str, directory: str | Path, *, tied: bool = False, seed: int = 0, eos_token_ids: list[int] | None = None, **overrides: Any
) -> PreTrainedModel:
    """Save a random float32 model of `family` (a key of FAMILIES) to `directory` and return it, in evaluation mode.

    Every parameter is random, biases and norms too: a weight that is zero or one hides mistakes. `eos_token_ids` goes into the generation
    config; `overrides` change the model's config. The caller's random state is unchanged.
    """
    settings = {**SIZES, **FAMILIES[family], "tie_word_embeddings": tied, **overrides}
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.copy_((1.0 if name.endswith("norm.weight") else 0.0) + 0.1 * torch.randn_like(parameter))
    if eos_token_ids is not None:
        model.generation_config.eos_token_id = eos_token_ids
    model.save_pretrained(directory)
    return model


def perturbed(model: PreTrainedModel, seed: int, scale: float = 0.1) -> dict[str, torch.Tensor]:
    """Return a copy of the model's state, under its Hugging Face names, with noise of `scale` standard deviations on every tensor.

    The output head of a tied model is left out, because it has no tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings
    state = {}
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            state[name] = tensor + scale * tensor.std() * torch.randn(tensor.shape, generator=generator)
    return state
