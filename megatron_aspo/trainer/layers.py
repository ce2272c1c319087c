"""The table of layer specs, and the two modules of the local spec that are ours: packed attention and RMSNorm."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_aspo.errors import UserError
from megatron_aspo.trainer.device import Device
from megatron_aspo.trainer.micro_batch import MicroBatch


@dataclass
class SharedPromptParams(PackedSeqParams):
    """Megatron's packed-sequence arguments, and who may look at whom inside each segment."""

    masks: list[Tensor] | None = None
    """[segment tokens, segment tokens] bool per segment; None means plain causal attention."""


def packed_params(micro: MicroBatch) -> SharedPromptParams:
    """What Megatron's attention and rotary embedding need to know of a packed micro-batch."""
    return SharedPromptParams(
        qkv_format="thd",
        cu_seqlens_q=micro.cu_seqlens,
        cu_seqlens_kv=micro.cu_seqlens,
        max_seqlen_q=micro.max_seqlen,
        max_seqlen_kv=micro.max_seqlen,
        masks=None if micro.branches is None else [_visible(branches) for branches in micro.branches],
    )


def _visible(branches: Tensor) -> Tensor:
    """A token sees what stands before it in the prompt and in its own response, and itself."""
    earlier = torch.ones(len(branches), len(branches), dtype=torch.bool, device=branches.device).tril()
    return earlier & ((branches[None] == -1) | (branches[None] == branches[:, None]))


class PackedAttention(MegatronModule):
    """Causal attention inside each segment of a packed batch, by torch's scaled-dot-product attention.

    Takes what Megatron hands any core attention module. Megatron's own local attention refuses packed batches; Transformer Engine's takes
    the same arguments on GPUs, but for segments that share a prompt.
    """

    def __init__(self, config: TransformerConfig, layer_number, attn_mask_type, attention_type, softmax_scale=None, **kwargs):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [tokens, heads, head size], key and value [tokens, key-value heads, head size] → [tokens, heads × head size]."""
        if packed_seq_params is None:
            raise ValueError("PackedAttention takes packed batches only")
        outputs = []
        edges = packed_seq_params.cu_seqlens_q.tolist()
        masks = getattr(packed_seq_params, "masks", None) or [None] * (len(edges) - 1)
        for start, stop, mask in zip(edges[:-1], edges[1:], masks, strict=True):
            # [1, heads, segment, head size]
            q, k, v = (tensor[start:stop].transpose(0, 1)[None] for tensor in (query, key, value))
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True, scale=self.softmax_scale
            )
            outputs.append(attended[0].transpose(0, 1).reshape(stop - start, -1))
        return torch.cat(outputs)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor that Megatron's specs call."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


def _local_block(config: TransformerConfig) -> TransformerBlockSubmodules:
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=RMSNorm)


def _transformer_engine_block(config: TransformerConfig) -> TransformerBlockSubmodules:
    from megatron.core.extensions.transformer_engine import TENorm

    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
    )
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=TENorm)


LAYER_SPECS: dict[str, Callable[[TransformerConfig], TransformerBlockSubmodules]] = {
    "local": _local_block,
    "transformer_engine": _transformer_engine_block,
}
"""Name → the layers of this pipeline stage. The names are also the namings of the weight map."""


def choose_layer_spec(wanted: str, device: Device) -> str:
    """`auto` becomes Transformer Engine where CUDA and the package are present, else local. Raises UserError for what cannot run here."""
    available = device.is_cuda and importlib.util.find_spec("transformer_engine") is not None
    if wanted == "auto":
        return "transformer_engine" if available else "local"
    if wanted == "transformer_engine" and not available:
        lacking = "the transformer_engine package" if device.is_cuda else "a CUDA device"
        raise UserError(f"trainer.layer_spec=transformer_engine needs {lacking}, which is not here; use auto or local")
    return wanted


def check_shared_prompts(layer_spec: str) -> None:
    """Raise UserError where the layers cannot do attention over shared prompts."""
    if layer_spec != "local":
        raise UserError(
            f"trainer.shared_prompts=true needs trainer.layer_spec=local: the attention of {layer_spec} takes plain causal segments only; "
            "set it to false"
        )
