"""The table of layer specs, and the small modules of the local spec that are ours: RMSNorm and SwiGLU."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aspo.common.errors import UserError
from megatron_aspo.trainer import transformer_engine
from megatron_aspo.trainer.attention import PackedAttention
from megatron_aspo.trainer.device import Device
from megatron_aspo.trainer.micro_batch import PackingRules
from megatron_aspo.trainer.options import TrainerOptions
from megatron_aspo.weights.layout import Coordinates, ParallelSizes


def packing_rules(options: TrainerOptions, sizes: ParallelSizes, at: Coordinates) -> PackingRules:
    """Return the rules that layout and layers impose on packed batches."""
    rules = PackingRules.of(sizes, at, options.sequence_parallel)
    if options.fp8 != "none":
        rules = replace(rules, multiple=math.lcm(rules.multiple, 16))
    return rules


class RMSNorm(torch.nn.Module):
    """x / √(mean(x²) + eps) · weight over the last dimension, with the constructor that Megatron's specs call.

    It computes in float32 (float64 for float64) and rounds once, as torch's RMSNorm does, in half the time. Backward needs only the input.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs):
        super().__init__()
        self.weight: Any = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        # Each tensor-parallel rank normalizes its own tokens: Megatron sums the gradients of parameters with this mark.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, grad = x * scale, grad.to(scale.dtype)
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad_normed = grad * weight
        along = (grad_normed * normed).mean(-1, keepdim=True)
        grad_x = grad_normed.addcmul_(normed, along, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class SwiGLU(torch.nn.Module):
    """silu(gate) · up of [..., gate | up], as torch's operators compute it, with the constructor that Megatron's specs call.

    Backward needs only the input, half of what the operators keep, and writes both halves of the gradient into one tensor.
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
    layer = _submodules(spec)
    layer.input_layernorm = RMSNorm
    layer.pre_mlp_layernorm = RMSNorm
    attention = _submodules(layer.self_attention)
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    mlp = _submodules(layer.mlp)
    (_submodules(mlp.experts) if config.num_moe_experts else mlp).activation_func = SwiGLU
    return _block(config, chunk, spec, RMSNorm)


def _submodules(module: ModuleSpec | functools.partial) -> Any:
    """Megatron-Core 0.16 describes a module by a ModuleSpec, 0.19 by a constructor with some arguments given."""
    return module.keywords["submodules"] if isinstance(module, functools.partial) else module.submodules


def _transformer_engine_block(config: TransformerConfig, chunk: int | None = None) -> TransformerBlockSubmodules:
    from megatron.core.extensions.transformer_engine import TENorm

    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
    )
    return _block(config, chunk, spec, TENorm)


def _block(config: TransformerConfig, chunk: int | None, layer: ModuleSpec, norm: Any) -> TransformerBlockSubmodules:
    """Return equal layers and the final norm. norm: a class, where Megatron declares an instance."""
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=chunk), layer_norm=norm)


LAYER_SPECS: dict[str, Callable[..., TransformerBlockSubmodules]] = {
    "local": _local_block,
    "transformer_engine": _transformer_engine_block,
}
"""Name → layers of this pipeline stage, or of one of its model chunks. The weight map names parameters by the same names."""


def choose_layer_spec(options: TrainerOptions, device: Device) -> str:
    """Return the layer spec; `auto` is Transformer Engine for bfloat16 where CUDA and the package are present, else local.

    Transformer Engine's flash and cuDNN attention take half-precision types only; its third kind holds segments × heads × longest² scores.
    Raises UserError for layers that cannot run here.
    """
    wanted, half = options.layer_spec, options.dtype == "bfloat16"
    available = device.is_cuda and transformer_engine.is_installed()
    if wanted == "auto":
        return "transformer_engine" if available and half else "local"
    if wanted == "transformer_engine" and not available:
        lacking = "the transformer_engine package" if device.is_cuda else "a CUDA device"
        raise UserError(f"trainer.layer_spec=transformer_engine needs {lacking}, which is not here; use auto or local")
    if wanted == "transformer_engine" and not half:
        raise UserError(
            f"trainer.layer_spec=transformer_engine computes attention in half precision only, not in trainer.dtype={options.dtype}; use "
            "auto or local, or trainer.dtype=bfloat16"
        )
    return wanted


def flash_attention() -> str:
    """Return the version of flash_attn, which Transformer Engine's attention may use, or `absent`: then it uses cuDNN's kernels."""
    return transformer_engine.installed_version("flash_attn") or "absent"


def check_layers(options: TrainerOptions, layer_spec: str, experts: int = 0) -> None:
    """Raise UserError if the layers, or their device, do not support the options or a model with this many experts."""
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
    if options.shared_prompts:
        raise UserError(
            f"trainer.shared_prompts=true needs trainer.layer_spec=local: the attention of {layer_spec} takes plain causal segments only; "
            "set it to false"
        )
    versions = (transformer_engine.installed_version(name) for name in ("transformer_engine_cu13", "nvidia-cublas"))
    if conflict := transformer_engine.cublas_conflict(*versions, experts=bool(experts)):
        raise UserError(conflict)
