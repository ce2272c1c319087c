"""Measure one training step against transformers:

    .venv/bin/python tools/bench/bench_train_step.py [--model DIR] [--rounds 6] [--dtypes float32]
[--device cuda]

One step: zero gradients, forward, clipped policy loss, backward, clip the gradient norm, AdamW. Both sides take the same tokens in the same
element type with the same number of threads, in one process, and compute logits of response tokens only. transformers uses torch's scaled
dot-product attention; so do this project's layers, except for short segments in bfloat16. With bfloat16 transformers keeps nothing in
float32; this project keeps main weights, moments and gradients there. Steps alternate; a ratio is the median of the rounds' ratios. Speeds
are real tokens per second: padding is work, not progress. On a GPU this project uses the layers that `auto` selects; those of Transformer
Engine cannot share prompts, so `short` is left out.

- equal: samples of one length. `padded_over_transformers` is our speed over theirs; nothing is padded on either side.
- mixed: lengths with a mean of a third of the longest. `packed_over_padded` is our speed, packed, over our own with the samples padded to
  the longest; `packed_over_transformers` is over transformers' on the padded batch.
- short: 8 responses of 12 tokens to each prompt of 44. `shared_over_packed` is our speed with `shared_prompts` over our speed without it,
  `shared_over_transformers` over transformers'.

The last line is one JSON object: the ratios of the slower element type for each of the first three, and all of them by element type.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

LR, EPS_CLIP, MAX_NORM = 1e-5, 0.2, 1.0


def samples(lengths: list[tuple[int, int]], group: int, vocab: int) -> list[tuple[list[int], list[int]]]:
    """Return samples of (prompt, response) token ids; each `group` consecutive samples share a prompt."""
    random = np.random.default_rng(0)
    made = []
    for number, (prompt, response) in enumerate(lengths):
        if number % group == 0:
            prompt_ids = random.integers(5, vocab, prompt).tolist()
        made.append((prompt_ids, random.integers(5, vocab, response).tolist()))
    return made


def shapes(name: str) -> tuple[list[tuple[int, int]], int]:
    """Return the (prompt, response) lengths, and how many samples share a prompt."""
    if name == "equal":
        return [(64, 64)] * 8, 1
    if name == "short":
        return [(44, 12)] * 16, 8
    # At most 384 tokens, 128 in the mean.
    return [(20, total - 20) for total in (384, 180, 140, 110, 80, 60, 40, 30)], 1


def as_batch(made: list[tuple[list[int], list[int]]], group: int, pad_to: int = 0):
    """Return our batch. With `pad_to`, samples are padded to that many tokens, which are computed but do not count."""
    from megatron_aspo.data.batch import TrainBatch

    lengths = [len(prompt) + len(response) for prompt, response in made]
    pads = [max(0, pad_to - length) for length in lengths]
    response_offsets = np.cumsum([0, *(len(response) + pad for (_, response), pad in zip(made, pads, strict=True))])
    return TrainBatch(
        token_ids=np.concatenate([np.array(p + r + [1] * pad) for (p, r), pad in zip(made, pads, strict=True)]),
        offsets=np.cumsum([0, *(length + pad for length, pad in zip(lengths, pads, strict=True))]),
        response_offsets=response_offsets,
        mask=np.concatenate([[True] * len(r) + [False] * pad for (_, r), pad in zip(made, pads, strict=True)]),
        rollout_logprobs=np.full(response_offsets[-1], -10.0, np.float32),
        rewards=np.zeros(len(made)),
        groups=np.arange(len(made)) // group,
        names=tuple(f"sample {number}" for number in range(len(made))),
    )


def our_step(trainer, batch) -> Callable[[], None]:
    import torch

    from megatron_aspo.trainer.optimizer import set_learning_rate
    from megatron_aspo.trainer.update import Scores

    per_token = np.repeat(np.where(np.arange(batch.samples) % 2, 1.0, -1.0), np.diff(batch.response_offsets)).astype(np.float32)
    old, advantages = (torch.from_numpy(values).to(trainer.device.torch_device) for values in (batch.rollout_logprobs, per_token))
    scores = Scores(old, None, advantages)
    set_learning_rate(trainer.optimizer, trainer.settings.optimizer, step=0)

    def step() -> None:
        trainer.updater.accumulate_gradients(batch, np.arange(batch.samples), scores)
        applied, _ = trainer.updater.apply_gradients()
        assert applied

    return step


def their_step(model, optimizer, made: list[tuple[list[int], list[int]]]) -> Callable[[], None]:
    import torch

    longest = max(len(p) + len(r) for p, r in made) - 1
    ids, attend = torch.zeros(2, len(made), longest, dtype=torch.long)
    rows, columns, targets, advantages = [], [], [], []
    for row, (prompt, response) in enumerate(made):
        tokens = (prompt + response)[:-1]
        ids[row, : len(tokens)], attend[row, : len(tokens)] = torch.tensor(tokens), 1
        rows += [row] * len(response)
        columns += range(len(prompt) - 1, len(tokens))
        targets += response
        advantages += [1.0 if row % 2 else -1.0] * len(response)
    mask = None if bool(attend.all()) else attend.to(model.device)
    ids, rows, columns, targets, advantages = (
        torch.as_tensor(values, device=model.device) for values in (ids, rows, columns, targets, advantages)
    )
    old = torch.full(targets.shape, -10.0, device=model.device)

    def step() -> None:
        optimizer.zero_grad()
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[rows, columns]
        logprobs = model.lm_head(hidden).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        ratio = (logprobs - old).exp()
        loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - EPS_CLIP, 1 + EPS_CLIP) * advantages).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()

    return step


def measure(directory: Path, dtype: str, rounds: int, device: str) -> dict[str, float]:
    """Return the ratios of one element type."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    from megatron_aspo.losses.options import AlgorithmOptions
    from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
    from megatron_aspo.trainer.rank import TrainerRank
    from megatron_aspo.trainer.settings import RankSettings

    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), attn_implementation="sdpa").to(device).train()
    adam = torch.optim.AdamW(theirs.parameters(), lr=LR)

    def ours(shared: bool):
        options = OptimizerOptions(lr=LR, clip_grad=MAX_NORM)
        algorithm = AlgorithmOptions(policy_loss="ppo_clip")
        return RankSettings(directory, TrainerOptions(dtype=dtype, shared_prompts=shared), options, algorithm, 1.0, 0, 8, 512)

    trainer = TrainerRank(ours(False), 0, dist.HashStore())
    shares = trainer.layer_spec == "local"
    seconds: dict[str, list[float]] = {}
    for name in ("equal", "mixed", *(["short"] if shares else [])):
        lengths, group = shapes(name)
        made = samples(lengths, group, trainer.hf.dims.vocab)
        steps = {"transformers": their_step(theirs, adam, made), "packed": our_step(trainer, as_batch(made, group))}
        if name == "mixed":
            steps["padded"] = our_step(trainer, as_batch(made, group, pad_to=max(sum(pair) for pair in lengths)))
        if name == "short":
            packed = our_step(trainer, as_batch(made, group))
            steps["shared"] = with_settings(trainer, ours(True), packed)
        tokens = sum(map(sum, lengths))
        for key, times in alternate(steps, rounds, trainer.device.synchronize).items():
            seconds[f"{name} {key}"] = times
            middle = statistics.median(times)
            print(f"{dtype} {name}: {key} {tokens / middle:.0f} tokens/s, {middle:.2f} s a step of {tokens} tokens", flush=True)
    trainer.close()

    def faster(one: str, other: str) -> float:
        return statistics.median(theirs / mine for mine, theirs in zip(seconds[one], seconds[other], strict=True))

    pairs = {
        "padded_over_transformers": ("equal packed", "equal transformers"),
        "packed_over_padded": ("mixed packed", "mixed padded"),
        "packed_over_transformers": ("mixed packed", "mixed transformers"),
    }
    if shares:
        pairs["shared_over_packed"] = ("short shared", "short packed")
        pairs["shared_over_transformers"] = ("short shared", "short transformers")
    return {name: faster(*pair) for name, pair in pairs.items()}


def with_settings(trainer, settings, step: Callable[[], None]) -> Callable[[], None]:
    """Return the step under other settings of the same ranks."""

    def run() -> None:
        before, trainer.settings = trainer.settings, settings
        step()
        trainer.settings = before

    return run


def alternate(steps: dict[str, Callable[[], None]], rounds: int, wait: Callable[[], None]) -> dict[str, list[float]]:
    """Return the seconds of each step in every round, after a warm-up. `wait` blocks until the device has finished its work."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            wait()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=0, help="threads of both sides (default: torch's)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="device of both sides (default: a GPU where there is one)")
    parsed = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if parsed.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for a GPU

    import torch

    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    figures = {dtype: measure(parsed.model, dtype, parsed.rounds, device) for dtype in parsed.dtypes}
    keys = ("padded_over_transformers", "packed_over_padded", "shared_over_packed")
    worst = {key: round(min(values), 3) for key in keys if (values := [ratios[key] for ratios in figures.values() if key in ratios])}
    by_dtype = {dtype: {key: round(ratio, 3) for key, ratio in ratios.items()} for dtype, ratios in figures.items()}
    print(json.dumps({**worst, **by_dtype, "threads": torch.get_num_threads(), "device": device}))


if __name__ == "__main__":
    main()
