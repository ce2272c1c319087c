"""One off-policy step of every layer spec and memory option on a small model, against plain PyTorch in float64 on the CPU."""

import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from gpu_sections.workload import nothing_left_behind

BOUNDS = {"float32": (1e-3, 1e-3, 1e-2), "bfloat16": (0.15, 0.05, 0.2), "fp8": (1.0, 0.3, 1.0)}
"""Largest error of a log-probability in nats; of the gradient norm, relative; of any gradient, relative to the tensor's largest."""
PLAIN = [{"dtype": "float32"}, {}]
LEVERS = [{"recompute": "full"}, {"recompute": "selective"}, {"offload_optimizer": True, "offload_reference": True}]
LOCAL = [*PLAIN, *LEVERS, {"gradient_dtype": "bfloat16"}, {"shared_prompts": True}]
ENGINE = [{}, *LEVERS, {"fp8": "e4m3"}, {"fp8": "hybrid"}]


def cases(small: bool) -> Iterator[tuple[str, Callable[[], dict]]]:
    specs = [("local", options) for options in LOCAL]
    if torch.cuda.is_available():
        specs += [("transformer_engine", options) for options in ENGINE]
    for spec, options in specs:
        words = " ".join(f"{name}={value}" for name, value in options.items())
        yield f"{spec} {words or 'bfloat16'}", partial(one_step, spec, options)
    if not torch.cuda.is_available():
        yield "transformer_engine", lambda: {"passed": None, "skipped": "no GPU"}


def one_step(spec: str, options: dict) -> dict:
    """Return the errors of log-probabilities, gradients and gradient norm, and of the updated weights."""
    from megatron_aspo.losses.options import AlgorithmOptions
    from megatron_aspo.trainer.options import TrainerOptions
    from megatron_aspo.trainer.settings import RankSettings
    from tests.parallel import workloads
    from tests.parallel.test_one_step import KL_COEF, OPTIMIZER, relative_error, truth

    case = small_case()
    trainer = TrainerOptions(**{"layer_spec": spec, "micro_batch_tokens": 64, "logprob_chunk_tokens": 16} | options)
    settings = RankSettings(case.directory, trainer, OPTIMIZER, AlgorithmOptions(policy_loss="aspo", kl_coef=KL_COEF), 1.0, 0, 2, 32)
    with tempfile.TemporaryDirectory() as meeting, nothing_left_behind():
        ours = workloads.one_step(0, f"{meeting}/store", settings, case.batch(), case.old, case.reference, case.advantages)
    true = truth(case, "aspo")
    errors = {
        "logprob_error": float(np.abs(ours["logprobs"] - true.logprobs).max()),
        "norm_error": float(abs(ours["norm"] / true.norm - 1)),
        "gradient_error": relative_error(ours["gradients"], true.gradients),
        "weight_error": relative_error(ours["weights"], true.weights),
    }
    bounds = BOUNDS["fp8" if trainer.fp8 != "none" else trainer.dtype]
    keys = ("logprob_error", "norm_error", "gradient_error")
    return {"passed": all(errors[key] <= bound for key, bound in zip(keys, bounds, strict=True))} | errors


@cache
def small_case():
    from tests.parallel.test_one_step import make_case

    return make_case(Path(tempfile.mkdtemp()), "qwen2", tied=True)
