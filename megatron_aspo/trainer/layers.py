"""The table of layer specs, and the modules of the local spec that are ours: packed attention, RMSNorm and SwiGLU."""

import functools
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aspo.errors import UserError
from megatron_aspo.trainer.device import Device
from megatron_aspo.trainer.micro_batch import MicroBatch, PackingRules
from megatron_aspo.trainer.options import TrainerOptions
from megatron_aspo.weights.layout import Coordinates, ParallelSizes


@dataclass
class SharedPromptParams(PackedSeqParams):
    """Megatron's packed-sequence arguments, and who may look at whom inside each segment."""

    masks: list[Tensor] | None = None
    """[segment tokens, segment tokens] bool per segment; None means plain causal attention. Rows of this context-parallel rank only."""
    order: Tensor | None = None
    """As MicroBatch.order."""


def packed_params(micro: MicroBatch) -> SharedPromptParams:
    """What Megatron's attention and rotary embedding need to know of a packed micro-batch."""
    return SharedPromptParams(
        qkv_format="thd",
        cu_seqlens_q=micro.cu_seqlens,
        cu_seqlens_kv=micro.cu_seqlens,
        max_seqlen_q=micro.max_seqlen,
        max_seqlen_kv=micro.max_seqlen,
        masks=_masks(micro),
        order=micro.order,
    )


def packing_rules(options: TrainerOptions, sizes: ParallelSizes, at: Coordinates) -> PackingRules:
    """What layout and layers ask of packed batches."""
    rules = PackingRules.of(sizes, at, options.sequence_parallel)
    if options.fp8 != "none":
        rules = replace(rules, multiple=math.lcm(rules.multiple, 16))
    return rules


def _masks(micro: MicroBatch) -> list[Tensor] | None:
    if micro.branches is None and micro.local is None:
        return None
    edges = micro.cu_seqlens.tolist()
    masks = []
    for i, (start, stop) in enumerate(pairwise(edges)):
        rows = torch.arange(stop - start, device=micro.cu_seqlens.device)
        if micro.local is not None:
            rows = micro.local[(micro.local >= start) & (micro.local < stop)] - start
        masks.append(_visible(rows, stop - start, None if micro.branches is None else micro.branches[i]))
    return masks


def _visible(rows: Tensor, tokens: int, branches: Tensor | None) -> Tensor:
    """bool [rows, tokens]: a token sees what stands before it in the prompt and in its own response, and itself."""
    earlier = torch.arange(tokens, device=rows.device)[None] <= rows[:, None]
    if branches is None:
        return earlier
    return earlier & ((branches[None] == -1) | (branches[None] == branches[rows, None]))


class PackedAttention(MegatronModule):
    """Causal attention inside each segment of a packed batch, by torch's scaled-dot-product attention.

    Under context parallelism each rank holds its tokens' queries and gathers the keys and values of all.
    Takes what Megatron hands any core attention module. Megatron's own local attention refuses packed batches; Transformer Engine's takes
    the same arguments on GPUs, but for segments that share a prompt.
    """

    def __init__(
        self, config: TransformerConfig, layer_number, attn_mask_type, attention_type, softmax_scale=None, pg_collection=None, **kwargs
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

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
        ranks = 1
        if self.cp_group is not None:
            ranks = self.cp_group.size()
            # Backward adds up what all ranks' queries give a key or value, and hands each rank its own.
            key, value = (gather_from_sequence_parallel_region(tensor, group=self.cp_group) for tensor in (key, value))
            key, value = key[packed_seq_params.order], value[packed_seq_params.order]
        outputs = []
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        masks = getattr(packed_seq_params, "masks", None)
        # Segments that follow one another and are as long go together: (length, how many, mask).
        if masks is None:
            runs = [(length, len(list(run)), None) for length, run in groupby(lengths)]
        else:
            runs = [(length, 1, mask) for length, mask in zip(lengths, masks, strict=True)]
        # Split, not sliced: the gradient of a slice is as large as what it was cut from.
        tokens = [length * count for length, count, _ in runs]
        queries = query.split([share // ranks for share in tokens])
        for (_, count, mask), q, k, v in zip(runs, queries, key.split(tokens), value.split(tokens), strict=True):
            # [segments, heads, segment, head size]
            q, k, v = (tensor.unflatten(0, (count, -1)).transpose(1, 2) for tensor in (q, k, v))
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True, scale=self.softmax_scale
            )
            outputs.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(outputs)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor that Megatron's specs call."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Each tensor-parallel rank normalizes its own tokens: Megatron adds the gradients up.
        self.weight.sequence_parallel = config.sequence_parallel


class SwiGLU(torch.nn.Module):
    """silu(gate) · up of [..., gate | up], as torch's operators compute it, with the constructor that Megatron's specs call.

    Backward needs only the input, half of what the operators keep, and writes the gradients of both halves where they belong.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        grads = torch.empty_like(gate_up)
        grad_gate, grad_up = grads.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grads


def _local_block(config: TransformerConfig, chunk: int | None = None) -> TransformerBlockSubmodules:
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    mlp = _submodules(spec.submodules.mlp)
    (_submodules(mlp.experts) if config.num_moe_experts else mlp).activation_func = SwiGLU
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config, vp_stage=chunk), layer_norm=RMSNorm)


def _submodules(module: ModuleSpec | functools.partial):
    """Megatron-Core 0.16 describes a module by a ModuleSpec, 0.19 by a constructor with some arguments given."""
    return module.keywords["submodules"] if isinstance(module, functools.partial) else module.submodules


def _transformer_engine_block(config: TransformerConfig, chunk: int | None = None) -> TransformerBlockSubmodules:
    from megatron.core.extensions.transformer_engine import TENorm

    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
    )
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config, vp_stage=chunk), layer_norm=TENorm)


LAYER_SPECS: dict[str, Callable[..., TransformerBlockSubmodules]] = {
    "local": _local_block,
    "transformer_engine": _transformer_engine_block,
}
"""Name → the layers of this pipeline stage, or of one model chunk of it. The names are also the namings of the weight map."""


def choose_layer_spec(wanted: str, device: Device) -> str:
    """`auto` becomes Transformer Engine where CUDA and the package are present, else local. Raises UserError for what cannot run here."""
    available = device.is_cuda and importlib.util.find_spec("transformer_engine") is not None
    if wanted == "auto":
        return "transformer_engine" if available else "local"
    if wanted == "transformer_engine" and not available:
        lacking = "the transformer_engine package" if device.is_cuda else "a CUDA device"
        raise UserError(f"trainer.layer_spec=transformer_engine needs {lacking}, which is not here; use auto or local")
    return wanted


def flash_attention() -> str:
    """The version of the flash_attn package, which Transformer Engine's attention may use, or `absent`: then cuDNN's kernels do it."""
    try:
        return importlib.metadata.version("flash_attn")
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def check_layers(options: TrainerOptions, layer_spec: str) -> None:
    """Raise UserError where the layers, or the device that they run on, cannot do what the options ask."""
    if layer_spec == "local":
        if options.fp8 != "none":
            raise UserError(
                f"trainer.fp8={options.fp8} needs trainer.layer_spec=transformer_engine, which runs on CUDA with the transformer_engine "
                "package; the layers here are local: set trainer.fp8=none"
            )
        return
    if options.fp8 != "none" and (capability := torch.cuda.get_device_capability()) < (8, 9):
        raise UserError(
            f"trainer.fp8={options.fp8} needs a GPU of compute capability 8.9 or higher; this one has {capability[0]}.{capability[1]}: "
            "set trainer.fp8=none"
        )
    if options.context_parallel > 1:
        raise UserError(
            f"trainer.context_parallel={options.context_parallel} needs trainer.layer_spec=local: with {layer_spec} it has not been held "
            "against the reference; set it to 1"
        )
    if options.shared_prompts:
        raise UserError(
            f"trainer.shared_prompts=true needs trainer.layer_spec=local: the attention of {layer_spec} takes plain causal segments only; "
            "set it to false"
        )
