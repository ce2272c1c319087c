"""From scored groups to what the trainer eats: one flat batch, and the samples of each mini-batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_aspo.data.records import Group


@dataclass(frozen=True)
class TrainBatch:
    """All samples of one step, one after another, nothing padded.

    Sample i is `token_ids[offsets[i]:offsets[i + 1]]`: its prompt, then its response. Response token arrays are laid out by
    `response_offsets` alike.
    """

    token_ids: np.ndarray
    """int64 [tokens]"""
    offsets: np.ndarray
    """int64 [samples + 1]"""
    response_offsets: np.ndarray
    """int64 [samples + 1]"""
    mask: np.ndarray
    """bool [response tokens]: which count in numerators and denominators."""
    rollout_logprobs: np.ndarray
    """float32 [response tokens]"""
    rewards: np.ndarray
    """float64 [samples]: shaped; a KL penalty in the reward is still to come."""
    groups: np.ndarray
    """int64 [samples]: number of the sample's group within the step, from 0 with no gap."""
    names: tuple[str, ...]
    """[samples]: how error messages name the sample."""

    @property
    def samples(self) -> int:
        return len(self.offsets) - 1

    @property
    def counted(self) -> np.ndarray:
        """int64 [samples]: counted response tokens."""
        return np.diff(np.concatenate([[0], np.cumsum(self.mask)])[self.response_offsets])

    @property
    def prompt_lengths(self) -> np.ndarray:
        """int64 [samples]"""
        return np.diff(self.offsets) - np.diff(self.response_offsets)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [samples]: tokens the model must read: the last response token is only ever a target."""
        return np.diff(self.offsets) - 1


def make_train_batch(groups: Sequence[Group], order: str, ranks: int, *, overlong_filter: bool) -> TrainBatch:
    """Flatten groups: as they come or, in the order `data_index`, by their prompts' places in the data set.

    Every response token counts, but not in a response that was cut off, with `overlong_filter`, nor, under `data_index`, in the last
    responses that are over a multiple of `ranks`. These stay for the statistics of their group.
    """
    multiple = 1
    if order == "data_index":
        groups, multiple = sorted(groups, key=lambda group: group.prompt.place), ranks
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
    """Sample indices of each optimizer step, in order: every epoch visits each group once, in a new order drawn from `seed`, or, with None,
    by number.
    """
    count = int(groups.max()) + 1 if groups.size else 0
    random = np.random.default_rng(seed)
    result = []
    for _ in range(epochs):
        order = np.arange(count) if seed is None else random.permutation(count)
        for start in range(0, count, groups_per_mini_batch):
            result.append(np.flatnonzero(np.isin(groups, order[start : start + groups_per_mini_batch])))
    return result
