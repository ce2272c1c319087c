"""Scored groups → the trainer's input: one flat batch, and the samples of each mini-batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_aspo.data.records import Group


@dataclass(frozen=True)
class TrainBatch:
    """All samples of one step, concatenated without padding.

    Sample i is `token_ids[offsets[i]:offsets[i + 1]]`: its prompt, then its response. `response_offsets` indexes the response token arrays
    in the same way.
    """

    token_ids: np.ndarray
    """int64 [tokens]"""
    offsets: np.ndarray
    """int64 [samples + 1]"""
    response_offsets: np.ndarray
    """int64 [samples + 1]"""
    mask: np.ndarray
    """bool [response tokens]: which tokens count in numerators and denominators."""
    rollout_logprobs: np.ndarray
    """float32 [response tokens]"""
    rewards: np.ndarray
    """float64 [samples]: shaped, before a KL penalty in the reward is applied."""
    groups: np.ndarray
    """int64 [samples]: index of the sample's group within the step, from 0 without gaps."""
    names: tuple[str, ...]
    """[samples]: the sample's name in errors."""

    @property
    def samples(self) -> int:
        return len(self.offsets) - 1

    @property
    def counted(self) -> np.ndarray:
        """The number of counted response tokens, int64 [samples]."""
        return np.diff(np.concatenate([[0], np.cumsum(self.mask)])[self.response_offsets])

    @property
    def prompt_lengths(self) -> np.ndarray:
        """int64 [samples]."""
        return np.diff(self.offsets) - np.diff(self.response_offsets)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens that the model reads, int64 [samples]: without the last response token, which is only a target."""
        return np.diff(self.offsets) - 1


def make_train_batch(groups: Sequence[Group], order: str, ranks: int, *, overlong_filter: bool) -> TrainBatch:
    """Flatten groups, in the given order or, for the order `data_index`, by their prompts' positions in the data set.

    Every response token counts, except in responses that are truncated, with `overlong_filter`, and, under `data_index`, in the last
    responses beyond a multiple of `ranks`. Those still enter the statistics of their group.
    """
    multiple = 1
    if order == "data_index":
        groups, multiple = sorted(groups, key=lambda group: group.prompt.position), ranks
    samples = [(number, sample) for number, group in enumerate(groups) for sample in group.samples]
    counts = [
        i < len(samples) // multiple * multiple and not (overlong_filter and s.generation.finish_reason == "length")
        for i, (_, s) in enumerate(samples)
    ]
    responses = [sample.generation.token_ids for _, sample in samples]
    tokens = [np.concatenate([s.prompt.token_ids, s.generation.token_ids]).astype(np.int64) for _, s in samples]
    return TrainBatch(
        token_ids=np.concatenate(tokens) if tokens else np.zeros(0, np.int64),
        offsets=_offsets(tokens),
        response_offsets=_offsets(responses),
        mask=np.repeat(np.array(counts, bool), [len(r) for r in responses]),
        rollout_logprobs=np.concatenate([s.generation.logprobs for _, s in samples] or [np.zeros(0)]).astype(np.float32),
        rewards=np.concatenate([*(group.shaped_rewards for group in groups), np.zeros(0)]),
        groups=np.array([number for number, _ in samples], np.int64),
        names=tuple(f"{s.prompt.id}[{s.index}]" for _, s in samples),
    )


def _offsets(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int64)


def mini_batches(groups: np.ndarray, groups_per_mini_batch: int, epochs: int, seed: int | None) -> list[np.ndarray]:
    """Return the sample indices of each optimizer step: every epoch visits each group once, in a new order drawn from `seed`, or by index
    if it is None.
    """
    count = int(groups.max()) + 1 if groups.size else 0
    random = np.random.default_rng(seed)
    result = []
    for _ in range(epochs):
        order = np.arange(count) if seed is None else random.permutation(count)
        for start in range(0, count, groups_per_mini_batch):
            result.append(np.flatnonzero(np.isin(groups, order[start : start + groups_per_mini_batch])))
    return result
