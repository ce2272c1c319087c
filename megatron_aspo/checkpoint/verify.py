"""Verifies that a Hugging Face directory and a checkpoint of Megatron's layers are the same model, by their logits on random tokens."""

import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_aspo.checkpoint.convert import Source
from megatron_aspo.common.errors import UserError

SEQUENCES, TOKENS = 2, 48
TOLERANCE = 1e-4
"""Tolerated difference relative to the largest logit, in float32: rounding stays far below it, a misplaced tensor exceeds it."""


def verify(hugging_face: Path, megatron: Source, dtype: torch.dtype) -> None:
    """Compare the float32 logits of transformers and of Megatron-Core for the two models, weights cast to `dtype`.

    Raises UserError with the difference if it exceeds rounding. Needs memory for one float32 model at a time.
    """
    with warnings.catch_warnings(action="ignore"):  # on import Megatron warns of each missing optional package
        expected, tokens = _transformers_logits(hugging_face, dtype)
        found = _megatron_logits(megatron, tokens, dtype)
    scale = float(expected.abs().max())
    difference = float((found - expected).abs().max())
    agreement = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    print(
        f"verify: {SEQUENCES} × {TOKENS} random tokens, largest |logit| {scale:.3g}, largest difference {difference:.2e}, "
        f"same best token for {100 * agreement:.1f} %"
    )
    if not difference <= TOLERANCE * scale:
        raise UserError(f"the logits of both models differ by {difference:.2e}, more than {TOLERANCE} of the largest, {scale:.3g}")


@torch.no_grad()
def _transformers_logits(directory: Path, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager", trust_remote_code=False).float()
    tokens = torch.randint(0, model.config.vocab_size, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))
    return model(tokens).logits, tokens


@torch.no_grad()
def _megatron_logits(source: Source, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from megatron_aspo.trainer import megatron_adapter

    megatron_adapter.prepare()
    from megatron_aspo.hf.transfer import assemble
    from megatron_aspo.trainer import parallel as parallel_states
    from megatron_aspo.trainer.attention import causal_params
    from megatron_aspo.trainer.device import select_device
    from megatron_aspo.trainer.model import build_model, output_weight, transformer_config
    from megatron_aspo.weights.families import layout
    from megatron_aspo.weights.layout import ParallelSizes

    megatron_adapter.prepare()  # again, for the modules imported since
    model, sizes, device = source.model, ParallelSizes(), select_device()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    parallel = parallel_states.initialize(0, sizes, dist.HashStore(), device, 60.0, seed=0)
    try:
        config = transformer_config(model, parallel, device, torch.float32, "local")
        built = build_model(model, config, parallel, "local").to(device.torch_device).eval()
        here = layout(model.architecture, model.dims, sizes, sizes.coordinates(0))
        parameters = dict(built.named_parameters())
        for name, values in assemble(here, source.reader, dict.fromkeys(parameters, dtype)):
            parameters[name].copy_(values)
        tokens = tokens.to(device.torch_device)
        hidden = built(
            input_ids=tokens.reshape(1, -1),
            position_ids=torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens))[None],
            attention_mask=None,
            packed_seq_params=causal_params([tokens.shape[1]] * len(tokens), tokens.device),
        )
        logits = hidden[:, 0] @ output_weight(built).T
        return logits[:, : model.dims.vocab].reshape(*tokens.shape, -1).cpu()
    finally:
        parallel_states.destroy()
