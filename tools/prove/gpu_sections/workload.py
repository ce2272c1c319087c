"""A random Qwen2.5-1.5B, packed samples for it, and a training rank in this process."""

import gc
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BIG = {
    "vocab_size": 151_936,
    "hidden_size": 1_536,
    "intermediate_size": 8_960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}


def random_qwen(directory: Path, small: bool):
    """Save the model to `directory` in bfloat16 and return transformers' model of it, on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.models import SIZES

    sizes = {name: SIZES[name] for name in BIG} if small else BIG
    config = AutoConfig.for_model("qwen2", **sizes, max_position_embeddings=32_768, tie_word_embeddings=True, rope_theta=1e6)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.save_pretrained(directory)
    return model


def samples(vocab: int, small: bool):
    """Return a TrainBatch of 64 samples, a prompt of 256 and 128 to 1,920 response tokens each, and its token ids by sample."""
    from megatron_aspo.data.batch import TrainBatch

    random = np.random.default_rng(0)
    count, prompt, shortest, longest = (8, 16, 8, 40) if small else (64, 256, 128, 1_921)
    responses = random.integers(shortest, longest, count)
    token_ids = [random.integers(5, vocab, prompt + response) for response in responses]
    ends = np.cumsum([0, *responses])
    batch = TrainBatch(
        token_ids=np.concatenate(token_ids),
        offsets=np.cumsum([0, *map(len, token_ids)]),
        response_offsets=ends,
        mask=np.ones(ends[-1], bool),
        rollout_logprobs=np.full(ends[-1], -12.0, np.float32),
        rewards=random.normal(size=count),
        groups=np.arange(count) // 8,
        names=tuple(f"sample {number}" for number in range(count)),
    )
    return batch, token_ids, prompt


@contextmanager
def training_rank(directory: Path, small: bool, **trainer):
    """Open a TrainerRank on the model, without a reference policy."""
    from megatron_aspo.losses.options import AlgorithmOptions
    from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
    from megatron_aspo.trainer.rank import TrainerRank
    from megatron_aspo.trainer.settings import RankSettings

    options = TrainerOptions(**{"micro_batch_tokens": 64 if small else 16_384} | trainer)
    algorithm = AlgorithmOptions(epochs=1, mini_batch_prompts=8, kl_coef=0.0)
    settings = RankSettings(directory, options, OptimizerOptions(lr=1e-5, warmup_steps=1), algorithm, 1.0, 0, 8, 1_920)
    with nothing_left_behind():
        rank = TrainerRank(settings, 0, dist.HashStore())
        try:
            yield rank
        finally:
            rank.close()


@contextmanager
def nothing_left_behind():
    """Destroy the process groups of a rank that failed inside, and free its memory, so that the next case can make its own."""
    from megatron_aspo.trainer import parallel

    try:
        yield
    finally:
        if dist.is_initialized():
            parallel.destroy()
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def taken() -> int:
    """Return the bytes of the whole card in use by any process; 0 on a CPU."""
    if DEVICE == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def new_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="gpu_check_"))
