"""Output projection and log-softmax with the whole vocabulary (tests/parallel has it sharded)."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_aspo.common.errors import UserError
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
    assert torch.equal(hidden.grad, torch.tensor([[-6e4, 0.0]]))
    assert torch.equal(weight.grad, torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))


def test_no_token_gives_no_value_and_zero_gradients():
    hidden, weight, _ = case()
    logprob, entropy = logprobs(hidden[:0], weight, torch.zeros(0, dtype=torch.int64), 1.0, None, vocab=37)
    assert logprob.numel() == entropy.numel() == 0
    (logprob.sum() * 0.0).backward()
    assert not weight.grad.any()


@pytest.mark.parametrize("used", [0, 1])
def test_a_value_that_no_loss_uses_adds_no_gradient(used):
    hidden, weight, targets = case()
    ours = logprobs(hidden, weight, targets, 0.7, None, vocab=37, chunk_tokens=4)[used]
    full = (hidden @ weight[:37].T / 0.7).log_softmax(-1)
    truth = (full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(-1))[used]
    upstream = torch.randn(11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(truth, (hidden, weight), upstream)
    for a, b in zip(torch.autograd.grad(ours, (hidden, weight), upstream), expected):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def test_every_backward_over_a_retained_graph_gives_the_gradients():
    hidden, weight, targets = case()
    full = (hidden @ weight[:37].T).log_softmax(-1)
    expected = torch.autograd.grad(full.gather(1, targets[:, None]).sum(), (hidden, weight))
    logprob, _ = logprobs(hidden, weight, targets, 1.0, None, vocab=37, chunk_tokens=4)
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(logprob.sum(), (hidden, weight), retain_graph=True), expected):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def test_bfloat16_is_summed_in_float32_and_its_gradients_are_bfloat16():
    hidden, weight, targets = (tensor.detach() for tensor in case(vocab=3000, padded=3072, tokens=50))
    ours = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    values = logprobs(*ours, targets, 1.0, None, vocab=3000, chunk_tokens=1)
    torch.autograd.backward(values, [torch.ones(50)] * 2)
    assert {value.dtype for value in values} == {torch.float32} and {x.grad.dtype for x in ours} == {torch.bfloat16}

    logits = (ours[0] @ ours[1][:3000].T).double()  # each logit is bfloat16
    full = logits.log_softmax(-1)
    torch.testing.assert_close(values[0].double(), full.gather(1, targets[:, None])[:, 0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(values[1].double(), -(full.exp() * full).sum(-1), rtol=1e-5, atol=1e-5)
    truth = [x.detach().double().requires_grad_() for x in ours]
    full = (truth[0] @ truth[1][:3000].T).log_softmax(-1)
    (full.gather(1, targets[:, None]).sum() - (full.exp() * full).sum()).backward()
    for a, b, rounding in zip(ours, truth, (0.007, 0.01)):  # the hidden states' gradient is a sum over the blocks
        assert (a.grad.double() - b.grad).norm() < rounding * b.grad.norm()


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("chunk", [2, 7, 64])
def test_at_most_the_logits_of_chunk_tokens_exist_at_once(chunk):
    hidden, weight, targets = case(vocab=1000, padded=1024, tokens=200)
    with Largest() as largest:
        logprob, entropy = logprobs(hidden, weight, targets, 1.0, None, vocab=1000, chunk_tokens=chunk)
        (logprob + entropy).sum().backward()
    assert largest.elements <= max(chunk * 1000, weight.numel())


def test_a_device_without_its_kernels_is_an_error_that_names_the_cure(monkeypatch):
    from megatron_aspo.trainer.logprobs import kernels

    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "megatron_aspo.trainer.logprobs_triton", raising=False)
    with pytest.raises(UserError, match="on cuda need triton, which is not installed: pip install triton"):
        kernels(torch.device("cuda"))
    with pytest.raises(UserError, match="on meta: expected one of cpu, cuda"):
        kernels(torch.device("meta"))
