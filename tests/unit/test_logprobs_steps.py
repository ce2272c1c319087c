"""The steps that read logits, PyTorch's and Triton's alike, against their closed form in float64.

Triton's run in its interpreter, which must be chosen before Triton is imported, so all of them run in a separate process.
"""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.reference.logit_steps import check_gradient, check_statistics, random_logits

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(1, 1), (1, 5), (4, 37), (7, 4096), (5, 4097), (3, 9001)]
ROUNDING = {"logprobs_torch": 2.0**-8, "logprobs_triton": 2.0**-7}
"""Rounding to bfloat16: Triton's interpreter truncates where a device rounds."""
DTYPES = [torch.float64, torch.float32, torch.bfloat16]

pytestmark = pytest.mark.parametrize("steps", ["logprobs_torch", "logprobs_triton"])


def start(environment: dict[str, str]) -> None:
    sys.path.append(str(ROOT / ".venv" / "triton"))
    os.environ.update(environment)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def interpreter():
    subprocess.run(["bash", ROOT / "tools" / "maintain" / "setup_triton.sh"], check=True)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start, ({"TRITON_INTERPRET": "1"},)) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def steps_module(steps):
    return import_module(f"megatron_aspo.trainer.{steps}")


def statistics_of_all_shapes(steps, dtype, temperature):
    for shape in SHAPES:
        logits, targets = random_logits(*shape, dtype)
        check_statistics(steps_module(steps), logits, temperature, targets)


def gradient_of_all_shapes(steps, dtype, temperature, with_slope):
    for shape in SHAPES:
        logits, targets = random_logits(*shape, dtype)
        check_gradient(steps_module(steps), logits, temperature, targets, with_slope=with_slope, rounding=ROUNDING[steps])


def logits_in_order(steps, first, last):
    logits = torch.linspace(first, last, 9001).repeat(4, 1)
    targets = torch.tensor([0, 9000, 4500, -1])
    check_statistics(steps_module(steps), logits, 1.0, targets)
    check_gradient(steps_module(steps), logits, 1.0, targets, with_slope=True, rounding=ROUNDING[steps])


def no_token(steps):
    logits, nothing = torch.zeros(0, 5), torch.zeros(0)
    module = steps_module(steps)
    assert module.statistics(logits, 1.0, nothing.long()).shape == (4, 0)
    module.gradient_(logits, 1.0, nothing.long(), nothing, nothing, nothing, nothing)


def all_logprobs(steps, dtype, temperature, chunk):
    """Compare values and gradients of `logprobs` by these steps with autograd in float64; the vocabulary is padded."""
    from megatron_aspo.trainer import logprobs as seam

    seam._STEPS["cpu"] = f"megatron_aspo.trainer.{steps}"
    vocab, padded, tokens = 300, 320, 11
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 8, generator=generator, dtype=torch.float64).to(dtype) for rows in (tokens, padded))
    targets = torch.randint(vocab, (tokens,), generator=generator)
    upstream = [torch.randn(tokens, generator=generator, dtype=torch.float64) for _ in range(2)]
    ours = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    values = seam.logprobs(*ours, targets, temperature, None, vocab=vocab, chunk_tokens=chunk)
    torch.autograd.backward(values, [u.to(value.dtype) for u, value in zip(upstream, values)])

    truth = hidden.double().requires_grad_(), weight.double().requires_grad_()
    full = (truth[0] @ truth[1][:vocab].T / temperature).log_softmax(-1)
    expected = full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(-1)
    torch.autograd.backward(expected, upstream)
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 5e-2}[dtype]
    for value, right in zip((*values, *(x.grad for x in ours)), (*expected, *(x.grad for x in truth))):
        torch.testing.assert_close(value.double(), right, rtol=tolerance, atol=tolerance)
    assert not ours[1].grad[vocab:].any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_equal_the_closed_form(interpreter, steps, dtype, temperature):
    interpreter(statistics_of_all_shapes, steps, dtype, temperature)


@pytest.mark.parametrize("with_slope", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_in_place_gradient_equals_the_closed_form(interpreter, steps, dtype, temperature, with_slope):
    interpreter(gradient_of_all_shapes, steps, dtype, temperature, with_slope)


@pytest.mark.parametrize("first, last", [(-1e4, 1e4), (1e4, -1e4), (-1e4, -9e3), (-3.0, 5.0)])
def test_a_rising_falling_or_low_peak_loses_no_precision(interpreter, steps, first, last):
    interpreter(logits_in_order, steps, first, last)


def test_no_token_is_no_error(interpreter, steps):
    interpreter(no_token, steps)


@pytest.mark.parametrize("chunk", [2, 5, 100])
@pytest.mark.parametrize("dtype, temperature", [(torch.float64, 0.7), (torch.float32, 1.0), (torch.bfloat16, 0.7)])
def test_logprobs_by_these_steps_equal_autograd(interpreter, steps, dtype, temperature, chunk):
    interpreter(all_logprobs, steps, dtype, temperature, chunk)
