"""Measure memory and time of the log-probabilities: .venv/bin/python tools/bench/bench_logprobs.py [--rounds 3] [--chunks 64 128 256]
[--device cuda]

One forward and backward of 4,096 tokens over a vocabulary of 151,936 with hidden size 1,536, in float32: the log-probability of
each target, the entropy, and the gradients of the former for the hidden states and the whole output matrix. The baseline is PyTorch's
autograd over `(hidden @ weightᵀ).log_softmax(-1)`, its entropy detached; ours is `megatron_aspo.trainer.logprobs` at several sizes of
`chunk_tokens`.

Every measurement has its own process with 2 threads, warmed up with a small case. Contestants alternate, and each result is the median over
the rounds. A round in which the two threads had less than 1.8 processors, because of other load, is marked: neither its times nor the ratio
of medians made of them bounds anything.

Memory is the peak resident size since before the forward pass (VmHWM, reset first), less what was resident then, less the two gradients,
which every contestant must return. TP2: two processes over gloo on loopback, with one thread and half of the vocabulary each; the larger of
the two is compared with the whole vocabulary at the same chunk size.

On a GPU, memory is torch's peak there, and TP2 is left out.

The last line is one JSON object, for the chunk size that is the default of `trainer.logprob_chunk_tokens`.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.trainer.logprobs import logprobs
from megatron_aspo.trainer.options import TrainerOptions

VOCAB, HIDDEN, TOKENS, THREADS = 151_936, 1_536, 4_096, 2
BUSY_ENOUGH = 0.9
"""Share of its threads' time that a contestant must have had for its round to count as undisturbed."""


def baseline(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    full = (hidden @ weight.t()).log_softmax(-1)
    detached = full.detach()
    return full.gather(1, targets[:, None])[:, 0], -(detached.exp() * detached).sum(-1)


def ours(chunk: int, vocab: int, group: dist.ProcessGroup | None) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda hidden, weight, targets: logprobs(hidden, weight, targets, 1.0, group, vocab=vocab, chunk_tokens=chunk)


def inputs(tokens: int, rows: int, vocab: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(device).requires_grad_()
    weight = torch.randn(rows, HIDDEN, generator=generator).mul_(HIDDEN**-0.5).to(device).requires_grad_()
    return hidden, weight, torch.randint(vocab, (tokens,), generator=generator).to(device)


def step(contestant: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], case: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Run forward and backward, with the mean log-probability as the loss; return the two gradients."""
    logprob, _ = contestant(*case)
    return torch.autograd.grad(logprob.mean(), case[:2])


def memory(key: str) -> int:
    """Return the bytes of VmRSS or VmHWM of this process."""
    return int(re.search(rf"^{key}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


def measure(chunk: int, ranks: int, tokens: int, device: str) -> dict[str, float]:
    """Measure one forward and backward in this process. A chunk of 0 is the baseline."""
    group = dist.group.WORLD if ranks > 1 else None
    small, case = inputs(8, 64, 64 * ranks, device), inputs(tokens, VOCAB // ranks, VOCAB, device)
    step(ours(4, 64 * ranks, group) if chunk else baseline, small)
    contestant = ours(chunk, VOCAB, group) if chunk else baseline
    if group is not None:
        dist.barrier(group)
    return (measure_on_gpu if device == "cuda" else measure_on_cpu)(contestant, case)


def measure_on_cpu(contestant: Callable[..., tuple[Tensor, Tensor]], case: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
    before, processor, start = memory("VmRSS"), time.process_time(), time.perf_counter()
    gradients = step(contestant, case)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    extra = memory("VmHWM") - before - sum(gradient.nbytes for gradient in gradients)
    return {"extra_bytes": extra, "seconds": seconds, "busy": processor / seconds / torch.get_num_threads()}


def measure_on_gpu(contestant: Callable[..., tuple[Tensor, Tensor]], case: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    step(contestant, case)  # kernels are compiled for these sizes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    gradients = step(contestant, case)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    extra = torch.cuda.max_memory_allocated() - before - sum(gradient.nbytes for gradient in gradients)
    return {"extra_bytes": extra, "seconds": seconds, "busy": 1.0}


def run(chunk: int, ranks: int, tokens: int, device: str) -> dict[str, float]:
    """Measure in `ranks` new processes; return the largest value of each kind over the ranks, the smallest of `busy`."""
    with tempfile.TemporaryDirectory() as meeting:
        command = [sys.executable, __file__, "--tokens", str(tokens), "--device", device, "--child", str(chunk), str(ranks)]
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS // ranks), "GLOO_SOCKET_IFNAME": "lo"}
        children = [
            subprocess.Popen([*command, str(rank), f"{meeting}/meeting"], stdout=subprocess.PIPE, env=environment) for rank in range(ranks)
        ]
        answers = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(f"chunk {chunk} on {ranks} ranks failed")
    figures = [json.loads(answer) for answer in answers]
    return {key: (min if key == "busy" else max)(figure[key] for figure in figures) for key in figures[0]}


def child(chunk: int, ranks: int, rank: int, meeting: str, tokens: int, device: str) -> None:
    torch.set_num_threads(THREADS // ranks)
    if ranks > 1:
        dist.init_process_group("gloo", store=dist.FileStore(meeting, ranks), rank=rank, world_size=ranks)
    print(json.dumps(measure(chunk, ranks, tokens, device)))
    if ranks > 1:
        dist.destroy_process_group()


def describe(chunk: int, ranks: int) -> str:
    return f"chunk {chunk}{' at TP2' if ranks > 1 else ''}" if chunk else "baseline"


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of log-probabilities and their gradients, against plain PyTorch.")
    parser.add_argument("--rounds", type=int, default=3, help="rounds to take the medians of (default 3)")
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="sizes of chunk_tokens in addition to the default"
    )
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"default {TOKENS}; the baseline needs 2.4 MB for each")
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu", help="default: a GPU where there is one")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.device == "cuda" and not gpu:
        parser.error("--device cuda: torch sees no GPU here")
    if parsed.child:
        chunk, ranks, rank, meeting = parsed.child
        return child(int(chunk), int(ranks), int(rank), meeting, parsed.tokens, parsed.device)
    default = TrainerOptions().logprob_chunk_tokens
    chunks = sorted({*parsed.chunks, default})
    contestants = [(0, 1), *((chunk, 1) for chunk in chunks)]
    if parsed.device == "cpu":
        contestants += [(chunk, 2) for chunk in chunks]
    rounds: dict[tuple[int, int], list[dict[str, float]]] = {contestant: [] for contestant in contestants}
    for number in range(parsed.rounds):
        for contestant in contestants:
            figures = run(*contestant, parsed.tokens, parsed.device)
            rounds[contestant].append(figures)
            disturbed = "" if figures["busy"] >= BUSY_ENOUGH else f", DISTURBED: its threads had {figures['busy']:.0%} of their time"
            seen = f"{figures['seconds']:.1f} s, {figures['extra_bytes'] / 1e6:.0f} MB{disturbed}"
            print(f"round {number + 1}: {describe(*contestant)}: {seen}", flush=True)

    def median(contestant: tuple[int, int], key: str) -> float:
        return statistics.median(figures[key] for figures in rounds[contestant])

    ratios = {
        chunk: {
            "memory_ratio": median((chunk, 1), "extra_bytes") / median((0, 1), "extra_bytes"),
            "time_ratio": median((chunk, 1), "seconds") / median((0, 1), "seconds"),
        }
        | ({"tp2_ratio": median((chunk, 2), "extra_bytes") / median((chunk, 1), "extra_bytes")} if (chunk, 2) in rounds else {})
        for chunk in chunks
    }
    for chunk in chunks:
        print(f"chunk {chunk}: " + ", ".join(f"{name} {value:.4f}" for name, value in ratios[chunk].items()))
    disturbed = sum(figures["busy"] < BUSY_ENOUGH for results in rounds.values() for figures in results)
    print(
        json.dumps(
            {name: round(value, 4) for name, value in ratios[default].items()}
            | {
                "chunk_tokens": default,
                "device": parsed.device,
                "baseline_seconds": round(median((0, 1), "seconds"), 2),
                "baseline_bytes": round(median((0, 1), "extra_bytes")),
                "disturbed": f"{disturbed} of {sum(map(len, rounds.values()))} measurements",
            }
        )
    )


if __name__ == "__main__":
    main()
