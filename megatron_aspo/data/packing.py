"""Packing: which samples share a micro-batch, which data-parallel rank runs it, and metrics of fill and balance.

Work is balanced over ranks: tokens + `pair_cost` · pairs of a token with one that it attends to. Ranks synchronise only at the end of a
mini-batch, where all wait for the fullest. Tokens, which bound memory, are balanced over the micro-batches of a rank.

`pair_cost` is the cost of a pair relative to a token's cost outside attention: in floating-point operations, 2 · layers · heads · head
dimension / parameters that a token meets; 0 balances tokens. By that count, for log-normal lengths up to 32,768 and 8 to 32 samples a
rank, balanced tokens leave the slowest rank 4 to 10 % over the mean at hidden size 1,536 and 2 to 6 % at 4,096, balanced work less than
1 % (tools/bench/bench_packing.py).
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from heapq import heappop, heappush
from operator import itemgetter

import numpy as np

from megatron_aspo.data.batch import TrainBatch

Bins = list[list[int]]
"""[bin] → indices of its items."""


def pack(
    batch: TrainBatch,
    samples: np.ndarray,
    ranks: int,
    token_budget: int,
    shared_prompts: bool,
    count_multiple: int = 1,
    pair_cost: float = 0.0,
) -> list[list[np.ndarray]]:
    """Return the micro-batches of each data-parallel rank: [rank][micro-batch] → sample indices, ascending. The order of `samples` does
    not matter.

    Every rank has the same number, a multiple of `count_multiple` and as few as `place` finds. Each reads at most `token_budget` tokens,
    except that a sample over the budget gets a micro-batch to itself. A micro-batch may be empty.

    The unit of placement is a sample or, with shared prompts, several samples of one group that read their prompt once. Long units balance
    badly, so groups are also split into units that add to a prompt at most a rank's mean, its half and its quarter; each reads the prompt
    again. The fewest micro-batches win, then the least work of the fullest rank, then the longest units.
    """
    samples = np.sort(samples)
    reading = _Reading(batch, shared_prompts)
    limits = [token_budget]
    if shared_prompts:
        mean, prompt = reading.tokens_and_pairs(samples)[0] // ranks, int(batch.prompt_lengths[samples].max(initial=0))
        limits += [limit for part in (1, 2, 4) if (limit := mean // part + prompt) < token_budget]
    packings = []
    for limit in limits:
        units = reading.units(samples, limit)
        sizes = [reading.tokens_and_pairs(unit) for unit in units]
        work = [tokens + round(pair_cost * pairs) for tokens, pairs in sizes]
        shares = place([tokens for tokens, _ in sizes], work, ranks, token_budget, count_multiple)
        fullest = max(sum(work[i] for micro in share for i in micro) for share in shares)
        packings.append((len(shares[0]), fullest, units, shares))
    _, _, units, shares = min(packings, key=lambda packing: packing[:2])
    return [[np.array(sorted(sample for i in micro for sample in units[i]), np.int64) for micro in share] for share in shares]


def unit_tokens(batch: TrainBatch, samples: np.ndarray) -> int:
    """Return the tokens that the model reads for samples of one group with a shared prompt: the prompt, and each response but its last
    token."""
    prompt = batch.prompt_lengths[samples[0]]
    return int(prompt + (batch.lengths[samples] - prompt).sum())


class _Reading:
    """Tokens and pairs that the model reads of a batch: each sample's prompt, or one prompt per group for adjacent samples of it."""

    def __init__(self, batch: TrainBatch, shared_prompts: bool):
        self._prompts: list[int] = batch.prompt_lengths.tolist()
        self._responses: list[int] = (batch.lengths - batch.prompt_lengths).tolist()
        self._groups: list[int] = batch.groups.tolist() if shared_prompts else list(range(batch.samples))

    def tokens_and_pairs(self, samples: Iterable[int]) -> tuple[int, int]:
        tokens = pairs = 0
        group = None
        for i in samples:
            prompt, response = self._prompts[i], self._responses[i]
            if self._groups[i] != group:
                group = self._groups[i]
                tokens += prompt
                pairs += prompt * (prompt + 1) // 2
            tokens += response
            pairs += response * prompt + response * (response + 1) // 2
        return tokens, pairs

    def units(self, samples: np.ndarray, most_tokens: int) -> list[list[int]]:
        """Split the samples, ascending, into units of placement: as many of a group as fit into `most_tokens`, at least one."""
        units: list[list[int]] = []
        tokens = 0
        for i in samples.tolist():
            if units and self._groups[units[-1][0]] == self._groups[i] and tokens + self._responses[i] <= most_tokens:
                units[-1].append(i)
            else:
                units.append([i])
                tokens = self._prompts[i]
            tokens += self._responses[i]
        return units


def place(lengths: list[int], work: list[int], ranks: int, token_budget: int, count_multiple: int = 1) -> list[Bins]:
    """Place units of these lengths in tokens: [rank][micro-batch] → units; the longest micro-batch of a rank comes first.

    The number of micro-batches starts at a lower bound (from total length, and units over half the budget) and rises by `count_multiple`
    until one of two ways keeps the budget: partition work over ranks, then tokens over the micro-batches of each; or, where that
    overfills a rank, partition tokens over all micro-batches, then deal these to ranks by work.
    """
    everything = list(range(len(lengths)))
    full = -(-sum(min(length, token_budget) for length in lengths) // token_budget)
    large = sum(2 * length > token_budget for length in lengths)
    count = round_up(-(-max(full, large, 1) // ranks), count_multiple)
    by_rank = partition(work, ranks)
    while True:
        shares = [_fit(share, lengths, token_budget, count) for share in by_rank]
        if all(shares):
            return [share for share in shares if share]
        if bins := _fit(everything, lengths, token_budget, ranks * count):
            dealt = partition([sum(work[i] for i in members) for members in bins], ranks, equal_counts=True)
            return [_longest_first([bins[b] for b in share], lengths) for share in dealt]
        count += count_multiple


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def _fit(units: list[int], lengths: list[int], token_budget: int, count: int) -> Bins | None:
    """Return `count` bins within the budget, longest first: balanced, or filled one by one if that exceeds it; None if neither fits.

    A unit over the budget has a bin to itself.
    """
    alone = [[i] for i in units if lengths[i] > token_budget]
    rest = [i for i in units if lengths[i] <= token_budget]
    free = count - len(alone)
    if free < 0 or (rest and not free):
        return None
    own = [lengths[i] for i in rest]
    bins = partition(own, free)
    if any(sum(own[i] for i in members) > token_budget for members in bins):
        bins = best_fit(own, token_budget)
        if len(bins) > free:
            return None
        bins += [[] for _ in range(free - len(bins))]
    return _longest_first(alone + [[rest[i] for i in members] for members in bins], lengths)


def _longest_first(bins: Bins, lengths: list[int]) -> Bins:
    return sorted(bins, key=lambda members: -sum(lengths[i] for i in members))


def best_fit(lengths: list[int], budget: int) -> Bins:
    """Pack by best-fit decreasing: the longest first, each into the fullest bin that fits it; of equally full bins, into the oldest."""
    bins: Bins = []
    room: list[tuple[int, int]] = []  # (left, bin), ascending
    for i in _descending(lengths):
        at = bisect_left(room, (lengths[i], -1))
        if at == len(room):
            left, chosen = budget, len(bins)
            bins.append([])
        else:
            left, chosen = room.pop(at)
        bins[chosen].append(i)
        insort(room, (left - lengths[i], chosen))
    return bins


def partition(weights: list[int], count: int, *, equal_counts: bool = False) -> Bins:
    """Return `count` bins of about equal totals: Karmarkar and Karp's differencing, then exchanges until none lowers the fullest bin.

    With `equal_counts` every bin has the same number of items; `weights` must then be a multiple of `count`. Without, the fullest holds at
    most 4/3 − 1 / (3 · count) times the optimum (Michiels, Korst, Aarts, van Leeuwen 2003, for differencing alone).
    """
    if not weights:
        return [[] for _ in range(count)]
    bins = difference(weights, count, equal_counts)
    _exchange(weights, bins, equal_counts)
    return bins


def _descending(weights: list[int]) -> list[int]:
    """Return indices, the largest weight first, equal ones in their order."""
    return sorted(range(len(weights)), key=lambda i: -weights[i])


def difference(weights: list[int], count: int, equal_counts: bool = False) -> Bins:
    """Return `count` bins by Karmarkar and Karp's largest differencing method (1982): initially each weight is a separate partition, or,
    with `equal_counts`, each run of `count` weights in descending order. The two partitions whose bins differ most are joined, the fullest
    bin of one with the emptiest of the other, until one is left. Ties go to the oldest partition.
    """
    order, at_first = _descending(weights), count if equal_counts else 1
    heap: list[tuple[int, int, list[tuple[int, list[int]]]]] = []  # (−difference, age, (total, members) of bins in descending order)
    age = 0

    def add(bins: list[tuple[int, list[int]]]) -> None:
        nonlocal age
        emptiest = bins[-1][0] if len(bins) == count else 0
        heappush(heap, (emptiest - bins[0][0], age, bins))
        age += 1

    for start in range(0, len(order), at_first):
        add([(weights[i], [i]) for i in order[start : start + at_first]])
    while len(heap) > 1:
        (_, _, one), (_, _, two) = heappop(heap), heappop(heap)
        # Bins that a partition omits are empty, so only this many meet a non-empty one.
        both = max(len(one) + len(two) - count, 0)
        met = [(a + b, p + q) for (a, p), (b, q) in zip(one[len(one) - both :], reversed(two[len(two) - both :]), strict=True)]
        add(sorted(one[: len(one) - both] + met + two[: len(two) - both], key=itemgetter(0), reverse=True))
    bins = [members for _, members in heap[0][2]]
    return bins + [[] for _ in range(count - len(bins))]


def _exchange(weights: list[int], bins: Bins, equal_counts: bool) -> None:
    """Lower the fullest bin in place by moving one of its weights to another bin, in exchange for a lighter one or, without
    `equal_counts`, for none, until no exchange lowers it.

    Bins are tried from the emptiest; of two exchanges, the one that leaves the two bins closer is made.
    """
    totals = [sum(weights[i] for i in members) for members in bins]
    least = max(max(weights), -(-sum(weights) // len(bins)))

    def lower_fullest() -> bool:
        fullest = max(range(len(bins)), key=totals.__getitem__)
        if totals[fullest] <= least:
            return False
        given = np.array([weights[i] for i in bins[fullest]])
        for other in sorted(range(len(bins)), key=totals.__getitem__):
            gap = totals[fullest] - totals[other]
            taken = np.array([weights[i] for i in bins[other]] + ([] if equal_counts else [0]), np.int64)
            off = np.abs(2 * (given[:, None] - taken) - gap)
            at, to = np.unravel_index(int(off.argmin()), off.shape)
            if off[at, to] < gap:
                moved = int(given[at] - taken[to])
                incoming = [bins[other].pop(to)] if to < len(bins[other]) else []
                bins[other].append(bins[fullest].pop(at))
                bins[fullest] += incoming
                totals[fullest] -= moved
                totals[other] += moved
                return True
        return False

    while lower_fullest():
        pass


@dataclass(frozen=True)
class PackingMetrics:
    """Fill and balance of micro-batches. Those of several mini-batches add up: `sum(parts, PackingMetrics())`."""

    tokens: int = 0
    """Tokens that the models of all ranks read."""
    room: int = 0
    """Capacity in tokens: micro-batches of all ranks × token budget."""
    mean: float = 0.0
    """Mean work of a rank, in tokens (as are the next two)."""
    fullest: float = 0.0
    """Work of the fullest rank of each mini-batch."""
    lockstep: float = 0.0
    """Work of the fullest rank at the first micro-batch, at the second, and so on, summed."""

    @property
    def fill(self) -> float:
        """Tokens over capacity; above 1 only with samples over the budget."""
        return self.tokens / self.room if self.room else 0.0

    @property
    def imbalance(self) -> float:
        """The fullest rank's work over the mean. Data-parallel ranks wait for each other only at the end of a mini-batch, so this is the
        factor by which a step takes longer than with perfect balance."""
        return self.fullest / self.mean if self.mean else 1.0

    @property
    def lockstep_imbalance(self) -> float:
        """The same factor if ranks waited for each other at every micro-batch, as they do where experts are spread over them."""
        return self.lockstep / self.mean if self.mean else 1.0

    def __add__(self, other: "PackingMetrics") -> "PackingMetrics":
        return PackingMetrics(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def measure(
    batch: TrainBatch, shares: list[list[np.ndarray]], token_budget: int, shared_prompts: bool, pair_cost: float = 0.0
) -> PackingMetrics:
    """Return the metrics of one mini-batch's `shares` from `pack`, given the same arguments."""
    reading = _Reading(batch, shared_prompts)
    sizes = np.array([[reading.tokens_and_pairs(micro) for micro in share] for share in shares], np.float64)
    tokens, pairs = sizes[..., 0], sizes[..., 1]
    work = tokens + pair_cost * pairs
    return PackingMetrics(
        tokens=int(tokens.sum()),
        room=tokens.size * token_budget,
        mean=float(work.sum() / len(shares)),
        fullest=float(work.sum(axis=1).max()),
        lockstep=float(work.max(axis=0).sum()),
    )
