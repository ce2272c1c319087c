"""The seam after the model, whole vocabulary (tests/parallel has it cut)."""

import pytest
import torch

from megatron_aspo.trainer.logprobs import logprobs


def case(vocab: int = 37, padded: int = 40, tokens: int = 11):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(padded, 8, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_log_softmax(chunk, temperature):
    hidden, weight, targets = case()
    ours = logprobs(hidden, weight, targets, temperature, None, vocab=37, chunk_tokens=chunk)
    full = (hidden @ weight[:37].T / temperature).log_softmax(-1)
    truth = full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(-1)
    upstream = [torch.randn(11, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    for a, b in zip(ours, truth):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(truth, (hidden, weight), upstream)
    for a, b in zip(torch.autograd.grad(ours, (hidden, weight), upstream), expected):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)
    assert not expected[1][37:].any()


def test_gradients_pass_finite_differences():
    hidden, weight, targets = case(vocab=7, padded=8, tokens=3)
    assert torch.autograd.gradcheck(lambda h, w: logprobs(h, w, targets, 0.9, None, vocab=7, chunk_tokens=2), (hidden, weight))


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[3e4, 0.0], [-3e4, 0.0], [0.0, 0.0]], requires_grad=True)
    logprob, entropy = logprobs(hidden, weight, torch.tensor([1]), 1.0, None, vocab=3)
    assert logprob.item() == -6e4 and entropy.item() == 0.0
    (logprob + entropy).backward()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_no_token_gives_no_value_and_zero_gradients():
    hidden, weight, _ = case()
    logprob, entropy = logprobs(hidden[:0], weight, torch.zeros(0, dtype=torch.int64), 1.0, None, vocab=37)
    assert logprob.numel() == entropy.numel() == 0
    (logprob.sum() * 0.0).backward()
    assert not weight.grad.any()
