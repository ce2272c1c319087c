"""Tokens per second, model FLOPs utilisation and peak memory of a training step, beside transformers on the same samples."""

import os
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from gpu_sections.workload import DEVICE, new_directory, random_qwen, samples, synchronize, training_rank

PEAK_FLOPS = 989e12
"""bfloat16 FLOP/s of an H100 or H200, by its data sheet."""
STEPS = 3


def cases(small: bool) -> Iterator[tuple[str, Callable[[], dict]]]:
    # The reference first, so that a section that runs out of time has something to compare with.
    yield "transformers, padded by 8, no float32 main weights", partial(transformers_step, small)
    if DEVICE == "cuda":
        for options in ({}, {"fp8": "hybrid"}, {"recompute": "full"}):
            yield f"transformer_engine {options or ''}".strip(), partial(our_step, small, layer_spec="transformer_engine", **options)
    yield "local", partial(our_step, small, layer_spec="local")


@cache
def model_and_samples(small: bool):
    directory = new_directory()
    model = random_qwen(directory, small)
    vocab, parameters = model.config.vocab_size, sum(parameter.numel() for parameter in model.parameters())
    shape = model.config.num_hidden_layers, model.config.hidden_size
    return directory, model, samples(vocab, small), parameters, shape


def figures(seconds: float, small: bool) -> dict:
    *_, (batch, _, _), parameters, (layers, hidden) = model_and_samples(small)
    tokens = int(batch.lengths.sum())
    # Forward and backward: 6 FLOPs for each parameter and token, and half of 12 for each pair of tokens, causal.
    flops = 6 * parameters * tokens + 6 * layers * hidden * int((batch.lengths.astype(np.int64) ** 2).sum())
    peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else 0.0
    mfu = round(flops / seconds / PEAK_FLOPS, 3) if DEVICE == "cuda" else None
    return {
        "step_s": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds),
        "mfu": mfu,
        "peak_gb": round(peak, 1),
    }


def our_step(small: bool, **options) -> dict:
    """Measure gradients of all samples and the optimizer's step; old log-probabilities are given."""
    directory, model, (batch, *_), *_ = model_and_samples(small)
    model.cpu()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with training_rank(directory, small, **options) as rank:
        from megatron_aspo.trainer.optimizer import set_learning_rate  # after rank.py, which prepares Megatron-Core
        from megatron_aspo.trainer.update import Scores

        advantages = torch.randn(len(batch.mask), device=DEVICE)
        scores = Scores(torch.from_numpy(batch.rollout_logprobs).to(DEVICE), None, advantages)
        set_learning_rate(rank.optimizer, rank.settings.optimizer, 0)
        times = []
        for _ in range(STEPS):
            synchronize()
            start = time.perf_counter()
            rank.updater.accumulate_gradients(batch, np.arange(batch.samples), scores)
            applied, norm = rank.updater.apply_gradients()
            synchronize()
            times.append(time.perf_counter() - start)
        found = {"passed": bool(applied) and np.isfinite(norm).item(), "first_s": round(times[0], 2)} | figures(min(times[1:]), small)
        if DEVICE == "cuda" and set(options) == {"layer_spec"}:
            found["profile"] = profile(rank, batch, scores)
    return found


def profile(rank, batch, scores) -> list[str]:
    """Return the kernels that take most of a step, in milliseconds; write the whole table to $OUT/profile_SPEC.txt if OUT is set."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        rank.updater.accumulate_gradients(batch, np.arange(batch.samples), scores)
        synchronize()
    averages = profiler.key_averages()
    if out := os.environ.get("OUT"):
        table = averages.table(sort_by="cuda_time_total", row_limit=60)
        Path(out, f"profile_{rank.layer_spec}.txt").write_text(table)
    longest = sorted(averages, key=lambda event: -event.device_time_total)[:12]
    return [f"{event.key[:80]}: {event.device_time_total / 1e3:.1f} ms in {event.count}" for event in longest]


def transformers_step(small: bool) -> dict:
    """Measure padded batches of 8 samples of similar length, all in bfloat16; logits of two samples at a time, since all would not fit."""
    _, model, (batch, token_ids, prompt), *_ = model_and_samples(small)
    model.to(DEVICE).train()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=DEVICE == "cuda")
    order = np.argsort([len(ids) for ids in token_ids])
    times = []
    for _ in range(2):
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        start = time.perf_counter()
        adam.zero_grad()
        for at in range(0, len(token_ids), 8):
            padded_backward(model, [token_ids[i] for i in order[at : at + 8]], prompt, len(batch.mask))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        synchronize()
        times.append(time.perf_counter() - start)
    found = figures(min(times), small)
    del adam
    model.zero_grad(set_to_none=True)
    return found


def padded_backward(model, rows: list[np.ndarray], prompt: int, tokens: int) -> None:
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = torch.from_numpy(row), 1
    ids, mask = ids.to(DEVICE), mask.to(DEVICE)
    output = model.model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=False).last_hidden_state[:, prompt - 1 :]
    leaf = output.detach().requires_grad_()
    for hidden, target, counts in zip(leaf.split(2), ids[:, prompt:].split(2), mask[:, prompt:].split(2), strict=True):
        logprobs = model.lm_head(hidden).float().log_softmax(-1).gather(2, target[..., None])[..., 0]
        (-(logprobs * counts).sum() / tokens).backward()
    output.backward(leaf.grad)
