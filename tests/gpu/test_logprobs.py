"""Triton's steps and the output layer that calls them on a device, against float64. Not yet run on hardware."""

import pytest
import torch

from megatron_aspo.trainer.logprobs import logprobs
from tests.reference.logit_steps import check_gradient, check_statistics, random_logits

pytestmark = pytest.mark.gpu

VOCAB, PADDED, HIDDEN, TOKENS = 10_007, 10_112, 64, 301


@pytest.mark.parametrize("shape", [(1, 1), (7, 4097), (33, 50_001)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_kernels_equal_their_closed_form(shape, dtype, temperature):
    from megatron_aspo.trainer import logprobs_triton

    logits, targets = (tensor.cuda() for tensor in random_logits(*shape, dtype))
    check_statistics(logprobs_triton, logits, temperature, targets)
    for with_slope in (True, False):
        check_gradient(logprobs_triton, logits, temperature, targets, with_slope=with_slope, rounding=2.0**-8)


def test_logits_with_offsets_over_32_bits_are_all_read_and_written():
    from megatron_aspo.trainer import logprobs_triton

    tokens, columns = 17_000, 130_001
    logits = torch.zeros(tokens, columns, dtype=torch.bfloat16, device="cuda")
    targets = torch.full((tokens,), columns - 1, device="cuda")
    peak, total, weighted, at_target = logprobs_triton.statistics(logits, 1.0, targets)
    assert not peak.any() and not weighted.any() and not at_target.any()
    torch.testing.assert_close(total, torch.full_like(total, columns))
    logprobs_triton.gradient_(logits, 1.0, targets, peak, torch.full_like(peak, 2), None, torch.ones_like(peak))
    assert (logits[:, -1] == 3).all() and (logits[-1, :-1] == 2).all()


@pytest.mark.parametrize("chunk", [7, 64, 1024])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_values_and_gradients_on_cuda_equal_float64(dtype, tolerance, chunk):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=generator).mul_(HIDDEN**-0.5).to(dtype)
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    upstream = torch.randn(2, TOKENS, generator=generator)
    ours = hidden.cuda().requires_grad_(), weight.cuda().requires_grad_()
    values = logprobs(*ours, targets.cuda(), 0.7, None, vocab=VOCAB, chunk_tokens=chunk)
    torch.autograd.backward(values, list(upstream.cuda()))

    truth = hidden.double().requires_grad_(), weight.double().requires_grad_()
    full = (truth[0] @ truth[1][:VOCAB].T / 0.7).log_softmax(-1)
    expected = full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(-1)
    torch.autograd.backward(expected, list(upstream.double()))
    for value, right in zip((*values, *(x.grad for x in ours)), (*expected, *(x.grad for x in truth))):
        torch.testing.assert_close(value.double().cpu(), right, rtol=tolerance, atol=tolerance)
