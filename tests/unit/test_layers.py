"""Our modules of the local layer spec, and the memory that they reuse."""

import resource
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_aspo.trainer import megatron_adapter

megatron_adapter.prepare()

from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_aspo.trainer.attention import ATTENTION, PackedAttention, causal_params, packed_params  # noqa: E402
from megatron_aspo.trainer.device import select_device  # noqa: E402
from megatron_aspo.trainer.layers import RMSNorm, SwiGLU  # noqa: E402
from megatron_aspo.trainer.micro_batch import PackingRules, cut  # noqa: E402
from tests.parallel.test_update import batch  # noqa: E402

CONFIG = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=4)


def test_swiglu_and_its_gradient():
    gate_up = torch.randn(5, 1, 12, dtype=torch.float64, requires_grad=True)
    gate, up = gate_up[..., :6], gate_up[..., 6:]
    torch.testing.assert_close(SwiGLU(CONFIG)(gate_up), gate / (1 + (-gate).exp()) * up)
    torch.autograd.gradcheck(SwiGLU(CONFIG), gate_up)


def test_rms_norm_and_its_gradient():
    norm = RMSNorm(CONFIG, 6, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 2, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight)
    torch.autograd.gradcheck(lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, x), (x, norm.weight))


def test_rms_norm_in_bfloat16_equals_torchs():
    mine, torch_s = RMSNorm(CONFIG, 64).bfloat16(), torch.nn.RMSNorm(64, eps=1e-5).bfloat16()
    upstream = torch.randn(9, 1, 64).bfloat16()
    weight = torch.randn(64)
    results = []
    for norm in (mine, torch_s):
        norm.weight.data.copy_(weight)
        x = torch.linspace(-3, 5, 9 * 64).view(9, 1, 64).bfloat16().requires_grad_()
        results.append((norm(x), *torch.autograd.grad(norm(x), (x, norm.weight), upstream)))
    assert torch.equal(results[0][0], results[1][0])
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["causal", "shared prompts"])
@pytest.mark.parametrize("lengths", [[4, 4, 4], [1, 3, 3, 6, 6, 2], [7], [300, 257, 256]], ids=str)
def test_packed_attention_by_its_definition(monkeypatch, lengths: list[int], shared: bool, dtype: torch.dtype, error: float, device: str):
    """Computed on the CPU by the rules of this device.

    Each segment separately, softmax written out in float64; gradients too. Segments of one length, which run together, and of several;
    the last third of a segment's tokens may be a second response to its first third.
    """
    monkeypatch.setitem(ATTENTION, "cpu", ATTENTION[device])
    torch.manual_seed(0)
    heads, key_heads, size, tokens = 4, 2, 8, sum(lengths)
    given = [torch.randn(tokens, n, size).to(dtype).requires_grad_() for n in (heads, key_heads, key_heads)]
    query, key, value = exact = [tensor.detach().double().requires_grad_() for tensor in given]
    edges = torch.tensor([0, *lengths]).cumsum(0).int()

    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    visible = (segment[:, None] == segment[None]) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    masks = None
    if shared:
        third = torch.cat([torch.arange(n) * 3 // n for n in lengths])
        visible &= ~((third[:, None] == 2) & (third[None] == 1))
        masks = [visible[a:b, a:b] for a, b in pairwise(edges.tolist())]
    outputs = []
    for head in range(heads):
        scores = query[:, head] @ key[:, head * key_heads // heads].T / size**0.5
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        outputs.append(weights @ value[:, head * key_heads // heads])
    expected = torch.stack(outputs, 1).flatten(1)

    params = replace(causal_params(lengths, torch.device("cpu")), masks=masks)
    found = PackedAttention(CONFIG, 1, None, "self")(*given, None, packed_seq_params=params)
    upstream = torch.randn(expected.shape).to(dtype)
    gradients = torch.autograd.grad(found, given, upstream)
    truth = torch.autograd.grad(expected, exact, upstream.double())
    for mine, true in zip((found, *gradients), (expected, *truth), strict=True):
        assert mine.dtype == dtype
        assert torch.linalg.vector_norm(mine.double() - true) <= error * torch.linalg.vector_norm(true)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_on_cuda_never_takes_the_kernel_that_holds_all_scores(monkeypatch, dtype: torch.dtype, masked: bool):
    """Flash takes grouped queries in half precision without a mask; with one, or in float32, keys and values have as many heads."""
    given = {}

    def kernel(query, key, value, attn_mask=None, is_causal=False, enable_gqa=False, scale=None):
        given.update(heads=key.shape[1], masked=attn_mask is not None, causal=is_causal, grouped=enable_gqa)
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    query, key = torch.zeros(2, 6, 5, 8, dtype=dtype), torch.zeros(2, 2, 5, 8, dtype=dtype)
    mask = torch.ones(5, 5, dtype=torch.bool) if masked else None
    ATTENTION["cuda"](query, key, key, mask, None)
    flash = dtype == torch.bfloat16 and not masked
    assert given == {"heads": 2 if flash else 6, "masked": masked, "causal": not masked, "grouped": flash}


def test_rotary_tables_rotate_queries_like_megatron():
    """Bit for bit, with gradients: Megatron's own function for packed batches, given one row of angles per token."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

    from megatron_aspo.trainer.attention import _rotate, rotary_tables

    class Alone:
        size, rank = (lambda self: 1), (lambda self: 0)

    torch.manual_seed(0)
    lengths, results = [3, 5, 2], []
    angles = torch.randn(10, 1, 1, 8)
    for dtype in (torch.float32, torch.bfloat16):
        query, upstream = torch.randn(10, 4, 8).to(dtype).requires_grad_(), torch.randn(10, 4, 8).to(dtype)
        edges = causal_params(lengths, torch.device("cpu")).cu_seqlens_q
        for turned in (_rotate(query, rotary_tables(angles, dtype)), _apply_rotary_pos_emb_thd(query, edges, angles, cp_group=Alone())):
            results.append((turned, *torch.autograd.grad(turned, query, upstream)))
    for ours, theirs in (results[:2], results[2:]):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs))


@pytest.mark.parametrize("context", [1, 2, 3])
def test_transformer_engine_gets_its_own_share_of_each_segment_and_no_masks(context: int):
    """Its rule for packed batches under context parallelism: a segment has 2 · context chunks, of which rank r has the r-th and the r-th
    from the end. It divides padded ends, and requires them.
    """
    given = batch(2)
    whole = cut(given, np.arange(6), torch.device("cpu"), rules=PackingRules(context=context))
    for rank in range(context):
        rules = PackingRules(context=context, context_rank=rank)
        micro = cut(given, np.arange(6), torch.device("cpu"), rules=rules)
        params = packed_params(micro, "transformer_engine")
        assert params.masks is None and params.max_seqlen_q == max(micro.lengths)
        if context == 1:
            assert params.cu_seqlens_q_padded is None
            continue
        assert params.cu_seqlens_q_padded is params.cu_seqlens_q and params.cu_seqlens_kv_padded is params.cu_seqlens_kv
        edges, mine = params.cu_seqlens_q.tolist(), []
        for start, stop in pairwise(edges):
            chunk = (stop - start) // (2 * context)
            for number in (rank, 2 * context - 1 - rank):
                mine += range(start + number * chunk, start + (number + 1) * chunk)
        assert chunk * 2 * context == stop - start and micro.local.tolist() == mine
        assert whole.position_ids.shape == micro.position_ids.shape and len(packed_params(micro, "local").masks) == len(micro.lengths)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA torch keeps freed memory itself")
def test_freed_memory_is_reused_by_the_next_layer():
    """Blocks that are freed and reused cost no new pages, at sizes that glibc by default returns at once."""
    select_device()

    def new_pages(megabytes: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(megabytes << 18)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    new_pages(128)  # slack: the C library takes alignment from a block, and the next of the same size may not fit
    assert max(new_pages(megabytes) for megabytes in (96, 64, 40)) < 100
