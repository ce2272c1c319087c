"""Builds Megatron's GPT model for a Hugging Face model directory."""

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_aspo.hf.model import HFModel
from megatron_aspo.trainer.device import Device
from megatron_aspo.trainer.layers import LAYER_SPECS
from megatron_aspo.trainer.megatron_adapter import hidden_state_model, set_rotary_frequencies
from megatron_aspo.trainer.options import TrainerOptions
from megatron_aspo.trainer.parallel import ParallelState
from megatron_aspo.weights.layout import padded_vocab


def _keep_uninitialized(weight: Tensor) -> Tensor:
    return weight


def transformer_config(
    model: HFModel,
    parallel: ParallelState,
    device: Device,
    dtype: torch.dtype,
    layer_spec: str,
    options: TrainerOptions = TrainerOptions(),  # noqa: B008 (frozen)
    deterministic: bool = False,
) -> TransformerConfig:
    """Return Megatron's configuration of this model on this layout. deterministic: of Megatron's and Transformer Engine's GPU kernels."""
    dims = model.dims
    interleaved = parallel.sizes.virtual > 1
    fused = layer_spec == "transformer_engine"
    return TransformerConfig(
        num_layers=dims.layers,
        hidden_size=dims.hidden,
        num_attention_heads=dims.heads,
        num_query_groups=dims.kv_heads,
        kv_channels=dims.head_dim,
        ffn_hidden_size=dims.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=dims.qkv_bias,
        qk_layernorm=dims.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.sizes.tensor,
        pipeline_model_parallel_size=parallel.sizes.pipeline,
        virtual_pipeline_model_parallel_size=parallel.sizes.virtual if interleaved else None,
        context_parallel_size=parallel.sizes.context,
        sequence_parallel=options.sequence_parallel,
        expert_model_parallel_size=parallel.sizes.expert,
        expert_tensor_parallel_size=parallel.sizes.expert_tensor_size,
        # Packed micro-batches differ in length: pipeline neighbours exchange shapes. The interleaved schedule, whose neighbours send both
        # ways at once, would deadlock on that: there micro-batches are padded to one length (micro_batch.py).
        variable_seq_lengths=parallel.sizes.pipeline > 1 and not interleaved,
        # With two stages both neighbours are the same rank, and batched messages would be mixed up.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        **_moe_config(model, layer_spec),
        **_recompute_config(model, options.recompute, layer_spec),
        fp8=None if options.fp8 == "none" else cast(Literal["e4m3", "hybrid"], options.fp8),
        # Scales from the tensor itself: Megatron's default uses a history of earlier steps, which checkpoints would have to hold.
        fp8_recipe="tensorwise",
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Every weight comes from the checkpoint. Initialization stays on as a no-op: Megatron marks tensor-parallel parameters there, and
        # the gradient norm counts unmarked ones on one rank only.
        init_method=_keep_uninitialized,
        output_layer_init_method=_keep_uninitialized,
        embedding_init_method=_keep_uninitialized,
        use_cpu_initialization=not device.is_cuda,
        deterministic_mode=deterministic and device.is_cuda,
        # Gradients are sums: losses/objective.py owns the denominators, known before the first micro-batch.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=fused,
        use_te_activation_func=not fused,  # the activation is a module of the layer spec (layers.SwiGLU)
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        persist_layer_norm=False,
        attention_softmax_in_fp32=True,
        softmax_scale=_softmax_scale(model),
    )


def _softmax_scale(model: HFModel) -> float | None:
    """Return the factor of query · key, None for Megatron's 1 / √(head size). Scaled cosines and sines scale both queries and keys."""
    if model.rope_scaling is None:
        return None
    return model.rope_scaling.attention_factor**2 / math.sqrt(model.dims.head_dim)


def _moe_config(model: HFModel, layer_spec: str) -> dict[str, Any]:
    """Return the options of routers and experts."""
    settings: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}  # the only one that Megatron allows with variable lengths
    if model.dims.experts:
        settings |= {
            "num_moe_experts": model.dims.experts,
            "moe_ffn_hidden_size": model.dims.moe_ffn,
            "moe_router_topk": model.experts_per_token,
            "moe_router_score_function": "softmax",
            # Weights that sum to one are the softmax over the chosen experts; otherwise they come from the softmax over all.
            "moe_router_pre_softmax": not model.norm_topk_prob,
            "moe_router_load_balancing_type": "none",
            "moe_grouped_gemm": layer_spec == "transformer_engine",
        }
    return settings


def _recompute_config(model: HFModel, recompute: str, layer_spec: str) -> dict[str, Any]:
    """Return the options that choose which activations backward recomputes."""
    if recompute == "selective":
        modules = ["moe" if model.dims.experts else "mlp"]
        if layer_spec == "local":  # Transformer Engine's fused attention keeps nothing that could be recomputed
            modules.append("core_attn")
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    if recompute == "full":  # layer by layer
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {}


def build_model(model: HFModel, config: TransformerConfig, parallel: ParallelState, layer_spec: str) -> torch.nn.Module:
    """Return this rank's part of the model, weights uninitialized. The forward pass ends at the final hidden states.

    Several model chunks are a ModuleDict, keyed by the prefixes that the weight map gives their parameters.
    """
    count = parallel.sizes.virtual
    if count == 1:
        return _build_chunk(model, config, parallel, layer_spec, None)
    return torch.nn.ModuleDict({f"model{chunk}": _build_chunk(model, config, parallel, layer_spec, chunk) for chunk in range(count)})


def chunks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the model chunks that the schedule runs, of a model that `build_model` built."""
    return list(model.values()) if isinstance(model, torch.nn.ModuleDict) else [model]


def output_weight(chunk: torch.nn.Module) -> Tensor:
    """Return this rank's rows of the output matrix, [rows, hidden size], from a chunk of the last stage, in Megatron's wrapper or not."""
    model: Any = getattr(chunk, "module", chunk)  # a HiddenStateModel
    return model.output_weight()


def _build_chunk(model: HFModel, config: TransformerConfig, parallel: ParallelState, layer_spec: str, chunk: int | None) -> torch.nn.Module:
    built = hidden_state_model()(
        config=config,
        transformer_layer_spec=LAYER_SPECS[layer_spec](config, chunk),
        vocab_size=padded_vocab(model.dims.vocab, parallel.sizes.tensor),
        max_sequence_length=model.max_positions,
        pre_process=parallel.is_first_stage and not chunk,
        post_process=parallel.is_last_stage and chunk in (None, parallel.sizes.virtual - 1),
        share_embeddings_and_output_weights=model.dims.tied,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,
        parallel_output=True,
        vp_stage=chunk,
    )
    if model.rope_scaling is not None:
        set_rotary_frequencies(built, model.rope_scaling.frequencies)
    # Megatron's schedule requires it; the class attribute differs between versions.
    built.model_type = ModelType.encoder_or_decoder
    return built
