"""The seam after the model: hidden states in, log-probability and entropy of each target token out.

Exact and vocabulary-parallel, in chunks of tokens, so that tokens × vocabulary never exists at once; the logits of a chunk are recomputed
in backward instead of kept. Old, reference and current log-probabilities all come from here.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def logprobs(
    hidden: Tensor,
    output_weight: Tensor,
    targets: Tensor,
    temperature: float,
    tp_group: dist.ProcessGroup | None,
    *,
    vocab: int,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Log-softmax(hidden @ weightᵀ / temperature) at the targets, and the entropy of that distribution.

    hidden: [tokens, hidden size], the same on every rank of `tp_group`; output_weight: [rows, hidden size], this rank's rows of the
    output matrix, padding included; targets: int64 [tokens]; vocab: true vocabulary size, rows beyond it do not exist for the softmax.
    `tp_group` None means the matrix is whole. Returns two float32 tensors [tokens] (float64 for float64 input), the same on every rank.
    Gradients reach `hidden` (summed over the group) and this rank's rows of `output_weight`.
    """
    return _Logprobs.apply(hidden, output_weight, targets, temperature, tp_group, vocab, chunk_tokens)


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, tp_group, vocab, chunk_tokens):
        rank, size = (dist.get_rank(tp_group), dist.get_world_size(tp_group)) if tp_group is not None else (0, 1)
        start = rank * weight.shape[0]
        rows = min(weight.shape[0], vocab - start)
        if rows <= 0:
            raise ValueError(f"tensor-parallel rank {rank} of {size} holds no row of the vocabulary of {vocab}")
        ctx.rows, ctx.start, ctx.temperature, ctx.tp_group, ctx.chunk_tokens = rows, start, temperature, tp_group, chunk_tokens
        results = [torch.empty(targets.shape, dtype=_accumulator(hidden), device=hidden.device) for _ in range(3)]
        for part in _chunks(targets.numel(), chunk_tokens):
            logits = _logits(hidden[part], weight[:rows], temperature)
            peak = logits.max(dim=-1).values
            _all_reduce(peak, tp_group, dist.ReduceOp.MAX)
            logits -= peak[:, None]
            local, owned = _local_targets(targets[part], start, rows)
            at_target = logits.gather(1, local[:, None])[:, 0].masked_fill(~owned, 0)
            exp = logits.exp()
            sums = torch.stack([at_target, exp.sum(dim=-1), (exp * logits).sum(dim=-1)])
            _all_reduce(sums, tp_group, dist.ReduceOp.SUM)
            at_target, total, weighted = sums
            log_total = total.log()
            for result, value in zip(results, (at_target - log_total, log_total - weighted / total, peak + log_total), strict=True):
                result[part] = value
        logprob, entropy, log_normalizer = results
        ctx.save_for_backward(hidden, weight, targets, entropy, log_normalizer)
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, targets, entropy, log_normalizer = ctx.saved_tensors
        rows = ctx.rows
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=_accumulator(weight), device=weight.device)
        for part in _chunks(targets.numel(), ctx.chunk_tokens):
            logprob = _logits(hidden[part], weight[:rows], ctx.temperature) - log_normalizer[part][:, None]
            probability = logprob.exp()
            # d logprob[target] = onehot − p;  d entropy = −p · (logprob + entropy)
            grad = (logprob + entropy[part][:, None]).mul_(-grad_entropy[part][:, None]).sub_(grad_logprob[part][:, None]).mul_(probability)
            local, owned = _local_targets(targets[part], ctx.start, rows)
            grad.scatter_add_(1, local[:, None], (grad_logprob[part] * owned)[:, None])
            grad /= ctx.temperature
            grad = grad.to(hidden.dtype)
            grad_hidden[part] = grad @ weight[:rows]
            grad_weight[:rows] += grad.t() @ hidden[part]
        _all_reduce(grad_hidden, ctx.tp_group, dist.ReduceOp.SUM)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(tokens: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return (hidden @ weight.t()).to(_accumulator(hidden)) / temperature


def _local_targets(targets: Tensor, start: int, rows: int) -> tuple[Tensor, Tensor]:
    """Row of each target in this rank's share (0 where another rank owns it), and whether this rank owns it."""
    local = targets - start
    owned = (local >= 0) & (local < rows)
    return local.masked_fill(~owned, 0), owned


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)
