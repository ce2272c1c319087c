"""From scored groups to what the trainer eats: one flat batch, and packed micro-batches cut from it."""

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


def pack(
    batch: TrainBatch, samples: np.ndarray, ranks: int, token_budget: int, shared_prompts: bool, count_multiple: int = 1
) -> list[list[np.ndarray]]:
    """Micro-batches of each data-parallel rank: [rank][micro-batch] → sample indices; the same number of micro-batches on every rank.

    That number is a multiple of `count_multiple`.

    What is placed is a sample or, with shared prompts, as many samples of one group as the token budget takes. The longest goes first
    to the lightest rank, then within the rank to the lightest of as many micro-batches as the budget asks of the fullest rank. A sample
    over the budget is a micro-batch of its own; a micro-batch may be empty.
    """
    units = _units(batch, samples, token_budget, shared_prompts)
    lengths = np.array([unit_tokens(batch, unit) for unit in units], np.int64)
    order = np.argsort(-lengths, kind="stable")
    shares = _balance(order, lengths, ranks)
    count = max(max(len(_first_fit(share, lengths, token_budget)) for share in shares), 1)
    count = -(-count // count_multiple) * count_multiple
    result = []
    for share in shares:
        packs = _balance(share, lengths, count)
        if max(int(lengths[p].sum()) for p in packs) > max(token_budget, int(lengths[share].max(initial=0))):
            # Balancing by total alone broke the budget: first fit keeps it, and needs no more than `count`.
            packs = _first_fit(share, lengths, token_budget)
            packs += [np.zeros(0, np.int64)] * (count - len(packs))
        result.append([np.sort(np.concatenate([units[i] for i in p] or [np.zeros(0, np.int64)])) for p in packs])
    return result


def unit_tokens(batch: TrainBatch, samples: np.ndarray) -> int:
    """Tokens that the model reads for samples of one group that share their prompt: the prompt, and each response but its last token."""
    prompt = batch.prompt_lengths[samples[0]]
    return int(prompt + (batch.lengths[samples] - prompt).sum())


def _units(batch: TrainBatch, samples: np.ndarray, token_budget: int, shared_prompts: bool) -> list[np.ndarray]:
    """The samples, cut into what is placed as one."""
    units: list[list[int]] = []
    for sample in np.sort(samples):
        if shared_prompts and units and batch.groups[units[-1][0]] == batch.groups[sample]:
            grown = [*units[-1], int(sample)]
            if unit_tokens(batch, np.array(grown)) <= token_budget:
                units[-1] = grown
                continue
        units.append([int(sample)])
    return [np.array(unit, np.int64) for unit in units]


def _balance(order: np.ndarray, lengths: np.ndarray, bins: int) -> list[np.ndarray]:
    totals, members = np.zeros(bins, np.int64), [[] for _ in range(bins)]
    for sample in order:
        lightest = int(totals.argmin())
        members[lightest].append(sample)
        totals[lightest] += lengths[sample]
    return [np.array(m, np.int64) for m in members]


def _first_fit(order: np.ndarray, lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    totals: list[int] = []
    members: list[list[int]] = []
    for sample in order:
        length = int(lengths[sample])
        fits = next((i for i, total in enumerate(totals) if total + length <= token_budget), None)
        if fits is None:
            totals.append(length)
            members.append([sample])
        else:
            totals[fits] += length
            members[fits].append(sample)
    return [np.array(m, np.int64) for m in members]
