"""Megatron's optimizer for a wrapped model, and its learning rate."""

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import Adam, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_aspo.trainer.options import OptimizerOptions


def wrap_model(
    model: torch.nn.Module, config: TransformerConfig, distributed_optimizer: bool, gradient_dtype: str = "float32"
) -> DistributedDataParallel:
    """Megatron's data-parallel wrapper: gradients summed (not averaged) over data-parallel ranks, refused when not finite.

    gradient_dtype: float32, or the parameters' own.
    """
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=gradient_dtype == "float32",
        use_distributed_optimizer=distributed_optimizer,
        check_for_nan_in_grad=True,
    )
    return DistributedDataParallel(config, ddp, model)


def build_optimizer(
    chunks: list[DistributedDataParallel],
    config: TransformerConfig,
    options: OptimizerOptions,
    dtype: torch.dtype,
    distributed_optimizer: bool,
) -> MegatronOptimizer:
    """AdamW over the parameters of all model chunks, and the schedule's hooks that need it."""
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
        chunks,
    )
    for group in optimizer.param_groups:
        if "fused" in group:  # torch's AdamW: one pass over memory instead of ten
            group["fused"] = True
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync

    def finalize(model_chunks, num_tokens, **kwargs):
        # The schedule counts tokens to divide by; ours are divided already (losses/objective.py).
        finalize_model_grads(model_chunks, None, **kwargs)

    config.finalize_model_grads_func = finalize
    return optimizer


def learning_rate(options: OptimizerOptions, step: int) -> float:
    """Of rollout step `step` (from 0): linear from lr / warmup_steps, or from 0, to lr, then constant."""
    return options.lr * min(1.0, (step + (not options.warmup_from_zero)) / max(1, options.warmup_steps))


def set_learning_rate(optimizer: MegatronOptimizer, options: OptimizerOptions, step: int) -> float:
    """Set this step's learning rate and weight decay on every parameter group; returns the rate."""
    rate = learning_rate(options, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
        # Megatron marks one-dimensional parameters with a multiplier of 0.
        group["weight_decay"] = options.weight_decay * (1.0 if options.decay_one_dimensional else group["wd_mult"])
    return rate


def fused_adam() -> str:
    """Which Adam Megatron found at its import: Transformer Engine's, apex's or torch's, in that order."""
    package = Adam.__module__.partition(".")[0]
    return "torch fused AdamW" if package == "torch" else f"{package} FusedAdam"
