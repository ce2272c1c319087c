"""Log-probabilities over a vocabulary of 151,936: error, milliseconds and peak memory, beside autograd over the full logits."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from megatron_aspo.trainer.logprobs import logprobs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHECKED = 64
"""Number of tokens compared with float64."""


def cases(small: bool) -> Iterator[tuple[str, Callable[[], dict]]]:
    for dtype in (torch.bfloat16, torch.float32):
        yield str(dtype).removeprefix("torch."), partial(measure, dtype, small)


def measure(dtype: torch.dtype, small: bool) -> dict:
    vocab, size, tokens = (1_003, 64, 100) if small else (151_936, 1_536, 4_096)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, size, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (torch.randn(vocab, size, generator=generator) * size**-0.5).to(DEVICE, dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator).to(DEVICE)

    def autograd():
        full = (hidden @ weight.t()).float().log_softmax(-1)
        return full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).detach().sum(-1)

    ways = {"autograd": autograd}
    for chunk in (256, 512, 1024):
        ways[f"chunk_{chunk}"] = partial(logprobs, hidden, weight, targets, 1.0, None, vocab=vocab, chunk_tokens=chunk)
    figures: dict = {}
    for name, way in ways.items():
        figures |= {f"{name}_{key}": value for key, value in timed(way, (hidden, weight), repeats=2 if small else 6).items()}
    with torch.no_grad():
        true = (hidden[:CHECKED].double() @ weight.double().t()).log_softmax(-1).gather(1, targets[:CHECKED, None])[:, 0]
        figures["error"] = float((ways["chunk_512"]()[0][:CHECKED].double() - true).abs().max())
    return {"passed": figures["error"] < (0.05 if dtype == torch.bfloat16 else 1e-3)} | figures


def timed(way: Callable[[], tuple], inputs: tuple, repeats: int) -> dict[str, float]:
    """Return the fastest forward and backward in milliseconds, and the peak memory in GB beyond what was allocated before."""
    times, peak = [], 0
    for _ in range(repeats):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        torch.autograd.grad(way()[0].mean(), inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        times.append(time.perf_counter() - start)
    return {"ms": round(1e3 * min(times), 2), "peak_gb": round(peak / 1e9, 3)}
