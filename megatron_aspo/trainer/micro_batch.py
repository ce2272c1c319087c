"""A packed micro-batch on the device: the model's inputs and the loss's indices; and the requirements of a layout."""

import math
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from megatron_aspo.data.batch import TrainBatch
from megatron_aspo.data.packing import round_up, unit_tokens
from megatron_aspo.weights.layout import Coordinates, ParallelSizes


@dataclass(frozen=True)
class PackingRules:
    """Requirements of a layout on packed batches, all in one record."""

    context: int = 1
    """Context-parallel ranks. Each segment is cut into 2 · context chunks; rank r holds the r-th and the r-th from the end, so that all
    have as much causal attention to do."""
    context_rank: int = 0
    multiple: int = 1
    """The tokens of a context-parallel rank are a multiple of this: sequence parallelism spreads them evenly, FP8 products need 16."""
    count_multiple: int = 1
    """The number of micro-batches is a multiple of this: the interleaved schedule runs as many at a time as there are stages."""
    equal_lengths: bool = False
    """All micro-batches of a pass have one length: pipeline stages do not exchange lengths (model.py)."""

    @classmethod
    def of(cls, sizes: ParallelSizes, at: Coordinates, sequence_parallel: bool) -> "PackingRules":
        interleaved = sizes.virtual > 1
        return cls(
            context=sizes.context,
            context_rank=at.context,
            multiple=sizes.tensor if sequence_parallel else 1,
            count_multiple=sizes.pipeline if interleaved else 1,
            equal_lengths=interleaved,
        )

    @property
    def segment_multiple(self) -> int:
        return 2 * self.context if self.context > 1 else 1

    def segment_tokens(self, tokens: int) -> int:
        """Return the length of a segment of this many tokens, padded at its end."""
        return round_up(tokens, self.segment_multiple)

    def total_tokens(self, tokens: int) -> int:
        """Return the length of a micro-batch of this many tokens, padded by a segment that nothing reads."""
        return round_up(max(tokens, 1), math.lcm(self.segment_multiple, self.context * self.multiple))

    def holders(self, lengths: list[int]) -> np.ndarray:
        """Return int64 [tokens]: the context-parallel rank that holds each token of segments of these padded lengths."""
        ranks = np.arange(self.context)
        return np.concatenate([np.repeat(np.concatenate([ranks, ranks[::-1]]), n // (2 * self.context)) for n in lengths])


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences ("segments"), one after another.

    A segment is one sample without its last token, which is only ever a target; with shared prompts it is one prompt, then the responses to
    it, each without its last token. Under context parallelism, the micro-batch is this rank's share.
    """

    token_ids: Tensor
    """int64 [1, tokens of this rank]"""
    position_ids: Tensor
    """int64 [1, tokens of all ranks]: the position of each token in its own sample."""
    cu_seqlens: Tensor
    """int32 [segments + 1]: offsets of segments in the tokens of all ranks, padding included."""
    lengths: list[int]
    """Tokens of each segment, as in cu_seqlens, on the host."""
    branches: list[Tensor] | None
    """With shared prompts, for each segment int64 [segment tokens]: −1 in the prompt, else which response a token belongs to; padding
    counts as one more."""
    local: Tensor | None
    """int64 [tokens of this rank]: which of all tokens they are; None: all of them."""
    order: Tensor | None
    """int64 [tokens]: the index of each token after concatenating the tokens of the context-parallel ranks; None: unchanged."""
    predictors: Tensor
    """int64 [response tokens of this rank]: index among this rank's tokens of the one whose hidden state predicts each."""
    targets: Tensor
    """int64 [response tokens of this rank]"""
    held: Tensor | None
    """int64 [response tokens of this rank]: which of the response tokens they are; None: all of them."""
    response_index: Tensor
    """int64 [response tokens]: the index of each in the step's response token arrays."""
    mask: Tensor
    """bool [response tokens]"""
    offsets: list[int]
    """Response i is response tokens [offsets[i], offsets[i + 1])."""
    names: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """The number of tokens of all ranks, padding included."""
        return self.position_ids.shape[1]


def cut_all(
    batch: TrainBatch, packs: list[np.ndarray], device: torch.device, shared_prompts: bool, rules: PackingRules
) -> list[MicroBatch]:
    """Return the micro-batches of a pass."""
    tokens = max(_packed_tokens(batch, pack, shared_prompts, rules) for pack in packs) if rules.equal_lengths else 0
    return [cut(batch, pack, device, shared_prompts, rules, tokens) for pack in packs]


def _segments(batch: TrainBatch, samples: np.ndarray, shared_prompts: bool) -> list[np.ndarray]:
    key = (lambda i: batch.groups[i]) if shared_prompts else (lambda i: i)
    return [np.array(list(members)) for _, members in groupby(samples, key=key)]


def _packed_tokens(batch: TrainBatch, samples: np.ndarray, shared_prompts: bool, rules: PackingRules) -> int:
    segments = _segments(batch, samples, shared_prompts)
    return rules.total_tokens(sum(rules.segment_tokens(unit_tokens(batch, segment)) for segment in segments))


def cut(
    batch: TrainBatch,
    samples: np.ndarray,
    device: torch.device,
    shared_prompts: bool = False,
    rules: PackingRules = PackingRules(),
    tokens: int = 0,
) -> MicroBatch:
    """Return the micro-batch of these samples, padded by the rules and to at least `tokens`.

    Without samples it has only padding, so that every rank runs the same schedule.
    """
    ids, positions, lengths, branches, predictors, targets, index = [], [], [], [], [], [], []
    start = 0

    def close_segment(own: int, padded: int, first_position: int, branch: int) -> None:
        """Add padding after the tokens of a segment, which do not attend to it."""
        count = padded - own
        ids.append(np.zeros(count))
        positions.append(first_position + np.arange(count))
        branches[-1].append(np.full(count, branch))
        lengths.append(padded)

    for segment in _segments(batch, samples, shared_prompts):
        prompt = int(batch.prompt_lengths[segment[0]])
        prompt_ids = batch.token_ids[batch.offsets[segment[0]] : batch.offsets[segment[0]] + prompt]
        ids.append(prompt_ids)
        positions.append(np.arange(prompt))
        branches.append([np.full(prompt, -1)])
        end = start + prompt
        for branch, i in enumerate(segment):
            response = batch.token_ids[batch.offsets[i] + prompt : batch.offsets[i + 1]]
            own = len(response) - 1
            ids.append(response[:-1])
            positions.append(prompt + np.arange(own))
            branches[-1].append(np.full(own, branch))
            # The prompt's last token predicts the first response token, of every response that shares it.
            predictors.append(np.concatenate([[start + prompt - 1], end + np.arange(own)]))
            targets.append(response)
            index.append(np.arange(batch.response_offsets[i], batch.response_offsets[i + 1]))
            end += own
        padded = rules.segment_tokens(end - start)
        close_segment(end - start, padded, 0, len(segment))
        start += padded
    total = max(rules.total_tokens(start), tokens)
    if total > start:
        branches.append([])
        close_segment(0, total - start, 0, -1)

    def flat(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([*arrays, np.zeros(0)]).astype(np.int64)

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    flat_ids, flat_predictors, flat_targets, flat_index = flat(ids), flat(predictors), flat(targets), flat(index)
    local = order = held = None
    if rules.context > 1:
        holders = rules.holders(lengths)
        by_rank = np.argsort(holders, kind="stable")
        own_tokens = np.flatnonzero(holders == rules.context_rank)
        own_responses = np.flatnonzero(holders[flat_predictors] == rules.context_rank)
        flat_ids, flat_targets = flat_ids[own_tokens], flat_targets[own_responses]
        flat_predictors = np.searchsorted(own_tokens, flat_predictors[own_responses])
        local, order, held = put(own_tokens), put(np.argsort(by_rank)), put(own_responses)
    return MicroBatch(
        token_ids=put(flat_ids)[None],
        position_ids=put(flat(positions))[None],
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device),
        lengths=lengths,
        branches=[put(flat(owners)) for owners in branches] if shared_prompts else None,
        local=local,
        order=order,
        predictors=put(flat_predictors),
        targets=put(flat_targets),
        held=held,
        response_index=put(flat_index),
        mask=torch.from_numpy(batch.mask[flat_index]).to(device),
        offsets=[0, *np.cumsum([len(target) for target in targets]).tolist()],
        names=tuple(batch.names[i] for i in samples),
    )
