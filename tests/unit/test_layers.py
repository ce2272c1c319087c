"""The modules of the local layer spec that are ours, and the memory they run in."""

import resource

import pytest
import torch

from megatron_aspo.trainer import megatron_adapter

megatron_adapter.prepare()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_aspo.trainer.device import select_device  # noqa: E402
from megatron_aspo.trainer.layers import PackedAttention, SwiGLU  # noqa: E402

CONFIG = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=4)


def test_swiglu_and_its_gradient():
    gate_up = torch.randn(5, 1, 12, dtype=torch.float64, requires_grad=True)
    gate, up = gate_up[..., :6], gate_up[..., 6:]
    torch.testing.assert_close(SwiGLU(CONFIG)(gate_up), gate / (1 + (-gate).exp()) * up)
    torch.autograd.gradcheck(SwiGLU(CONFIG), gate_up)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [1, 3, 3, 6, 6, 2], [7]], ids=str)
def test_packed_attention_by_its_definition(lengths: list[int]):
    """Each segment for itself, softmax written out; gradients too. Segments of one length, which run together, and of several."""
    heads, key_heads, size, tokens = 4, 2, 8, sum(lengths)
    query, key, value = (torch.randn(tokens, n, size, dtype=torch.float64, requires_grad=True) for n in (heads, key_heads, key_heads))
    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=edges, cu_seqlens_kv=edges)

    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    visible = (segment[:, None] == segment[None]) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    outputs = []
    for head in range(heads):
        scores = query[:, head] @ key[:, head * key_heads // heads].T / size**0.5
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        outputs.append(weights @ value[:, head * key_heads // heads])
    expected = torch.stack(outputs, 1).flatten(1)

    found = PackedAttention(CONFIG, 1, None, "self")(query, key, value, None, packed_seq_params=params)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (query, key, value), upstream)
    torch.testing.assert_close(torch.autograd.grad(found, (query, key, value), upstream), wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA torch keeps freed memory itself")
def test_freed_memory_serves_the_next_layer():
    """Blocks that come and go cost no new pages, at sizes that glibc by itself gives back at once."""
    select_device()

    def new_pages(megabytes: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(megabytes << 18)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    new_pages(96)
    assert max(new_pages(megabytes) for megabytes in (96, 64, 40)) < 100
