"""The one normalisation: from per-token losses to the loss of a mini-batch, however it is split into micro-batches and ranks."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_aspo.losses.options import AlgorithmOptions


@dataclass(frozen=True)
class Totals:
    """Counts of the whole mini-batch, over all micro-batches and ranks, known before the first micro-batch runs."""

    tokens: int
    """Counted tokens."""
    responses: int
    """Responses with a counted token."""
    full_responses: int
    """Responses of a full mini-batch, before any filter: mini_batch_prompts × responses_per_prompt."""
    max_response_tokens: int
    entropy_threshold: float | None = None
    """Quantile of entropy over the mini-batch, where that is the scope."""


def token_weights(mask: Tensor, offsets: list[int], options: AlgorithmOptions, totals: Totals) -> Tensor:
    """Return w, float64 [tokens], 0 where no token counts, such that Σ w_t·L_t over all micro-batches is the mini-batch's loss.

    With N responses (`sequence_count`), n_i counted tokens in response i and M = max_response_tokens, w of its counted tokens is
    token_mean 1 / Σn · seq_mean_token_mean 1 / (N·n_i) · seq_mean_token_sum 1 / N · seq_mean_token_sum_norm 1 / (N·M) (Dr.GRPO,
    arXiv 2503.20783). Denominators come from the whole mini-batch; contributions are added and never averaged, so neither loss nor gradient
    depends on how it is split.
    """
    if options.aggregation == "token_mean":
        return mask.double() / max(totals.tokens, 1)
    responses = totals.full_responses if options.sequence_count == "full_mini_batch" else max(totals.responses, 1)
    if options.aggregation == "seq_mean_token_sum":
        return mask.double() / responses
    if options.aggregation == "seq_mean_token_sum_norm":
        return mask.double() / (responses * totals.max_response_tokens)
    parts = [mask[start:stop] for start, stop in pairwise(offsets)]
    return torch.cat([part.double() / (responses * part.sum().clamp(min=1)) for part in parts] or [mask.double()])
