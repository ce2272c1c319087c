"""Distributed checkpoints as a user of Megatron-Core makes them. The project only provides what Megatron-Core needs to run on CPUs.

Each function is collective, as in workloads.py.
"""

import gc
import importlib
import multiprocessing
import zlib
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist


def logits(
    rank: int, meeting: str, sizes: dict, config: dict, model: dict, tokens: list[int], load: str | None, save: str | None
) -> np.ndarray | None:
    """Return the logits [tokens, vocabulary] of a GPTModel with local layers, on the last pipeline stage.

    sizes, config: arguments of initialize_model_parallel and TransformerConfig; model: arguments of GPTModel. load: a directory of
    dist_checkpointing to load from, strictly; None: every weight is random. save: a directory to write.
    """
    from megatron_aspo.trainer import megatron_adapter

    megatron_adapter.prepare()
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    for late in ("torch", "filesystem_async", "state_dict_saver"):  # otherwise imported lazily
        importlib.import_module(f"megatron.core.dist_checkpointing.strategies.{late}")
    megatron_adapter.prepare()  # again, for modules imported since
    world = sizes["tensor_model_parallel_size"] * sizes["pipeline_model_parallel_size"] * sizes.get("expert_model_parallel_size", 1)
    dist.init_process_group("gloo", store=dist.FileStore(meeting, world), rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(**sizes, create_gloo_process_groups=False)
    try:
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            **config,
            **sizes,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            normalization="RMSNorm",
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cpu_initialization=True,
            pipeline_dtype=torch.float32,
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            bias_dropout_fusion=False,
            apply_rope_fusion=False,
            moe_token_dispatcher_type="alltoall",
        )
        first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        built = GPTModel(
            config,
            get_gpt_layer_local_spec(
                num_experts=config.num_moe_experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
            ),
            pre_process=first,
            post_process=last,
            parallel_output=False,
            position_embedding_type="rope",
            **model,
        ).eval()
        if load is None:
            _randomize(built)
        else:
            state = dist_checkpointing.load({"model": built.sharded_state_dict()}, load, strict="raise_all")
            built.load_state_dict(state["model"])
        if save is not None:
            with _may_have_children():
                dist_checkpointing.save({"model": built.sharded_state_dict()}, save)
        return _forward(built, config, first, last, tokens)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def _may_have_children():
    """Megatron-Core writes from child processes, which a pool's processes may not have; none is left afterwards."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    settings = multiprocessing.current_process()._config
    daemon, settings["daemon"] = settings.get("daemon"), False
    try:
        yield
    finally:
        settings["daemon"] = daemon
        filesystem_async._results_queue = None
        gc.collect()


def _randomize(model: torch.nn.Module) -> None:
    """Set random values, norms and biases too; the same on every rank that holds the same shard."""
    from megatron.core import parallel_state

    shard, stage = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model.share_embeddings_and_output_weights:
                name = name.replace("output_layer.weight", "embedding.word_embeddings.weight")
            at = [stage] if ".layers." in name else []
            at += [shard] if getattr(parameter, "tensor_model_parallel", False) else []
            at += [parallel_state.get_expert_model_parallel_rank()] if ".local_experts." in name else []
            generator = torch.Generator().manual_seed(zlib.crc32(repr((name, at)).encode()))
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * values if "norm" in name else 0.08 * values)


@torch.no_grad()
def _forward(model, config, first: bool, last: bool, tokens: list[int]) -> np.ndarray | None:
    from megatron.core import parallel_state

    count = len(tokens)
    mask = torch.ones(count, count, dtype=torch.bool).triu(1)[None, None]
    if not first:
        hidden = torch.empty(count, 1, config.hidden_size)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    output = model(torch.tensor([tokens]), torch.arange(count)[None], mask)
    if last:
        return output[0].numpy()
    dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None
