"""Megatron's data-parallel wrapper and optimizer, and the learning rate."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    Adam,  # pyright: ignore[reportAttributeAccessIssue]  from the first of three packages that it finds
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_aspo.trainer.options import OptimizerOptions


def wrap_model(
    model: torch.nn.Module, config: TransformerConfig, distributed_optimizer: bool, gradient_dtype: str = "float32"
) -> DistributedDataParallel:
    """Return the model in Megatron's wrapper, which sums (not averages) gradients over data-parallel ranks and refuses non-finite ones.

    gradient_dtype: float32, or the parameters' own.
    """
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=gradient_dtype == "float32",
        use_distributed_optimizer=distributed_optimizer,
        check_for_nan_in_grad=True,
    )
    return DistributedDataParallel(config, ddp, model)


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    config: TransformerConfig,
    options: OptimizerOptions,
    dtype: torch.dtype,
    distributed_optimizer: bool,
) -> MegatronOptimizer:
    """Return AdamW over the parameters of all model chunks; sets the hooks of the schedule in `config`."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=options.lr,
            weight_decay=options.weight_decay,
            adam_beta1=options.beta1,
            adam_beta2=options.beta2,
            adam_eps=options.eps,
            clip_grad=options.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=distributed_optimizer,
        ),
        list(chunks),
    )
    for group in optimizer.param_groups:
        if "fused" in group:  # torch's AdamW: one pass over memory instead of ten
            group["fused"] = True
    config.grad_scale_func = optimizer.scale_loss
    no_sync: Any = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    config.no_sync_func = no_sync  # Megatron declares a function, and takes one for each of several chunks

    def finalize(model_chunks, num_tokens, **kwargs):
        # The schedule counts tokens to divide by; our gradients are already normalised (losses/objective.py).
        finalize_model_grads(model_chunks, None, **kwargs)

    config.finalize_model_grads_func = finalize
    return optimizer


def learning_rate(options: OptimizerOptions, step: int) -> float:
    """Return the rate of rollout step `step` (from 0): it rises linearly to lr, which step `warmup_steps` - 1 has, then stays constant.

    Step 0 has lr / warmup_steps; with `warmup_from_zero` it has 0, and step `warmup_steps` is the first with lr.
    """
    return options.lr * min(1.0, (step + (not options.warmup_from_zero)) / max(1, options.warmup_steps))


def set_learning_rate(optimizer: MegatronOptimizer, options: OptimizerOptions, step: int) -> float:
    """Set this step's learning rate and weight decay on every parameter group and return the rate."""
    rate = learning_rate(options, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
        # Megatron marks one-dimensional parameters with a multiplier of 0.
        group["weight_decay"] = options.weight_decay * (1.0 if options.decay_one_dimensional else group["wd_mult"])
    return rate


def take_step(optimizer: MegatronOptimizer) -> tuple[bool, float]:
    """Clip and take one step. Return whether it was applied, and the gradient norm before clipping."""
    untyped: Any = optimizer  # Megatron's base class declares no result of `step`
    applied, gradient_norm, _ = untyped.step()
    optimizer.zero_grad()  # float32 copies of bfloat16 gradients would stay until the next step
    return bool(applied), float(gradient_norm)


def fused_adam() -> str:
    """Return the name of the Adam that Megatron found at import: Transformer Engine's, apex's or torch's, in that order."""
    package = Adam.__module__.partition(".")[0]
    return "torch fused AdamW" if package == "torch" else f"{package} FusedAdam"
