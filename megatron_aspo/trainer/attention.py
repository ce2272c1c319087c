"""Attention of packed batches for the local layers: which token sees which, and the module that Megatron calls."""

import math
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_aspo.trainer.micro_batch import MicroBatch

_SHORT = 256
"""Longest segment, in tokens, whose bfloat16 attention is computed by its definition on the CPU. Torch's kernel takes, forward and
backward, 4 times as long for 64 tokens, 2.7 times for 127, 1.3 times for 256, and 0.8 times for 1,000 (2 threads; 9 heads of 64, 3 of
keys and values)."""


@dataclass
class SharedPromptParams(PackedSeqParams):
    """Megatron's packed-sequence arguments, with the attention masks that the local layers also need.

    Made once per micro-batch and read by every layer; reading it never makes the host wait for the device.
    """

    lengths: list[int] = field(default_factory=list)
    """Tokens of each segment, as in cu_seqlens."""
    masks: list[Tensor] | None = None
    """[segment tokens, segment tokens] bool per segment; None means plain causal attention. Rows of this context-parallel rank only."""
    local: Tensor | None = None
    order: Tensor | None = None
    """`local` and `order` are those of MicroBatch."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines [tokens of this rank, 1, head size] for queries and keys; set by the model (megatron_adapter.py)."""


def causal_params(lengths: list[int], device: torch.device) -> SharedPromptParams:
    """Return the arguments for plain causal segments of these lengths."""
    return _params(lengths, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device))


def packed_params(micro: MicroBatch, layer_spec: str) -> SharedPromptParams:
    """Return the arguments of these layers' attention and rotary embedding for a packed micro-batch."""
    params = _params(micro.lengths, micro.cu_seqlens)
    if layer_spec == "local":
        return replace(params, masks=_masks(micro), local=micro.local, order=micro.order)
    if micro.local is not None:
        # Transformer Engine cuts segments into 2 · context chunks and assigns each rank the same two as PackingRules. It then reads only
        # the padded ends; here padding counts as tokens of its segment, invisible to the tokens before it.
        return replace(params, cu_seqlens_q_padded=micro.cu_seqlens, cu_seqlens_kv_padded=micro.cu_seqlens)
    return params


def _params(lengths: list[int], cu_seqlens: Tensor) -> SharedPromptParams:
    longest = max(lengths)
    return SharedPromptParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=lengths,
    )


def _masks(micro: MicroBatch) -> list[Tensor] | None:
    if micro.branches is None and micro.local is None:
        return None
    device, start, masks = micro.cu_seqlens.device, 0, []
    # Every context-parallel rank holds the same number of tokens of each segment.
    shares = None if micro.local is None else micro.local.split([length * len(micro.local) // micro.tokens for length in micro.lengths])
    for i, length in enumerate(micro.lengths):
        rows = torch.arange(length, device=device) if shares is None else shares[i] - start
        masks.append(_visible(rows, length, None if micro.branches is None else micro.branches[i]))
        start += length
    return masks


def _visible(rows: Tensor, tokens: int, branches: Tensor | None) -> Tensor:
    """Return bool [rows, tokens]: a token sees itself and the tokens before it in the prompt and in its own response."""
    earlier = torch.arange(tokens, device=rows.device)[None] <= rows[:, None]
    if branches is None:
        return earlier
    return earlier & ((branches[None] == -1) | (branches[None] == branches[rows, None]))


def rotary_tables(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [tokens, 1, head size] of Megatron's angles [tokens, 1, 1, head size], in the dtype of queries and keys."""
    return angles[:, 0].cos().to(dtype), angles[:, 0].sin().to(dtype)


def _rotate(tensor: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Apply Megatron's rotary embedding, bit for bit, to [tokens, heads, head size]. Backward keeps only the tables, which layers share."""
    cosines, sines = rotary
    first, second = tensor.chunk(2, -1)
    return tensor * cosines + torch.cat([-second, first], -1) * sines


class PackedAttention(MegatronModule):
    """Rotary embedding, then causal attention inside each segment of a packed batch.

    Megatron's own rotary embedding of packed batches reads every segment's offset from the device, in each layer, for queries and keys.
    Under context parallelism each rank holds its tokens' queries and gathers the keys and values of all ranks.
    It takes the arguments that Megatron passes to any core attention module. Megatron's own local attention refuses packed batches;
    Transformer Engine's takes the same arguments on GPUs, except for segments that share a prompt.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number,
        attn_mask_type,
        attention_type,
        softmax_scale=None,
        pg_collection: Any = None,
        **kwargs,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: SharedPromptParams | None = None,
    ) -> Tensor:
        """query [tokens, heads, head size], key and value [tokens, key-value heads, head size] → [tokens, heads × head size]."""
        if packed_seq_params is None:
            raise ValueError("PackedAttention takes packed batches only")
        if packed_seq_params.rotary is not None:
            query, key = _rotate(query, packed_seq_params.rotary), _rotate(key, packed_seq_params.rotary)
        ranks = 1
        if self.cp_group is not None:
            ranks = self.cp_group.size()
            # Backward sums the gradients that all ranks' queries give a key or value and returns each rank its own.
            key, value = (gather_from_sequence_parallel_region(tensor, group=self.cp_group) for tensor in (key, value))
            key, value = key[packed_seq_params.order], value[packed_seq_params.order]
        outputs = []
        lengths, masks = packed_seq_params.lengths, packed_seq_params.masks
        attend = ATTENTION[query.device.type]
        # Consecutive segments of equal length are computed together: (length, count, mask).
        if masks is None:
            runs = [(length, len(list(run)), None) for length, run in groupby(lengths)]
        else:
            runs = [(length, 1, mask) for length, mask in zip(lengths, masks, strict=True)]
        # Split, not sliced: the gradient of a slice is as large as the tensor it comes from.
        tokens = [length * count for length, count, _ in runs]
        queries = query.split([share // ranks for share in tokens])
        for (_, count, mask), q, k, v in zip(runs, queries, key.split(tokens), value.split(tokens), strict=True):
            # [segments, heads, segment, head size]
            q, k, v = (tensor.unflatten(0, (count, -1)).transpose(1, 2) for tensor in (q, k, v))
            outputs.append(attend(q, k, v, mask, self.softmax_scale).transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(outputs)


def _attend_on_cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Return attention [segments, heads, tokens, head size] of arguments of that shape.

    mask: as in SharedPromptParams; scale: None for 1 / √(head size).
    """
    if query.dtype == torch.bfloat16 and key.shape[2] <= _SHORT:
        if mask is None:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        return _ShortAttention.apply(query, key, value, mask, scale or query.shape[-1] ** -0.5)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True, scale=scale)


def _attend_on_cuda(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Return the same without torch's plain kernel, which holds heads × tokens² scores.

    torch's flash kernel takes grouped queries, but only in half precision and without a mask; its memory-efficient kernel takes masks and
    float32, but needs as many heads of keys and values as of queries.
    """
    if mask is None and query.dtype in (torch.bfloat16, torch.float16):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=scale)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)


ATTENTION = {"cpu": _attend_on_cpu, "cuda": _attend_on_cuda}
"""Attention of packed segments, by type of device."""


class _ShortAttention(torch.autograd.Function):
    """softmax(scale · query keyᵀ) value by its definition, with float32 scores; heads that share keys and values are one matrix.

    Backward keeps the probabilities, in the dtype of the arguments.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, scale):
        segments, heads, tokens, size = query.shape
        query = query.reshape(segments, key.shape[1], -1, size)
        scores = torch.matmul(query.float(), key.float().transpose(-1, -2)).mul_(scale)
        scores.unflatten(2, (-1, tokens)).masked_fill_(~mask, -math.inf)
        probabilities = scores.softmax(-1).to(value.dtype)
        ctx.save_for_backward(query, key, value, probabilities)
        ctx.scale = scale
        return torch.matmul(probabilities, value).view(segments, heads, tokens, size)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, probabilities = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(query.shape)
        grad_probabilities = torch.matmul(grad, value.transpose(-1, -2)).float()
        weights = probabilities.float()
        mean = (grad_probabilities * weights).sum(-1, keepdim=True)
        grad_scores = grad_probabilities.sub_(mean).mul_(weights).mul_(ctx.scale).to(key.dtype)
        grad_query = torch.matmul(grad_scores, key).view(shape)
        return (
            grad_query,
            torch.matmul(grad_scores.transpose(-1, -2), query),
            torch.matmul(probabilities.transpose(-1, -2), grad),
            None,
            None,
        )
