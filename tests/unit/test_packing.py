"""Packing: its invariants, its distance from the optimum, and its metrics."""

import importlib.util
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from megatron_aspo.data.batch import TrainBatch
from megatron_aspo.data.packing import PackingMetrics, best_fit, difference, measure, pack, partition, place
from megatron_aspo.trainer.micro_batch import cut

ROOT = Path(__file__).resolve().parents[2]


def load_bench():
    spec = importlib.util.spec_from_file_location("bench_packing", ROOT / "tools/bench/bench_packing.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = load_bench()


def batch_of(groups: list[tuple[int, list[int]]]) -> TrainBatch:
    """Return a batch of these (prompt tokens, response tokens of each sample)."""
    prompts = np.array([prompt for prompt, responses in groups for _ in responses], np.int64)
    responses = np.array([response for _, responses in groups for response in responses], np.int64)
    offsets, response_offsets = (np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64) for lengths in (prompts + responses, responses))
    return TrainBatch(
        token_ids=np.zeros(offsets[-1], np.int64),
        offsets=offsets,
        response_offsets=response_offsets,
        mask=np.ones(response_offsets[-1], bool),
        rollout_logprobs=np.zeros(response_offsets[-1], np.float32),
        rewards=np.zeros(len(responses)),
        groups=np.repeat(np.arange(len(groups)), [len(lengths) for _, lengths in groups]),
        names=tuple(f"p{i}" for i in range(len(responses))),
    )


def plain(*lengths: int) -> TrainBatch:
    """Return a batch of samples of which the model reads these numbers of tokens."""
    return batch_of([(1, [length]) for length in lengths])


def lists(shares: list[list[np.ndarray]]) -> list[list[list[int]]]:
    return [[micro.tolist() for micro in share] for share in shares]


def totals(weights: list[int], bins: list[list[int]]) -> list[int]:
    return [sum(weights[i] for i in members) for members in bins]


def optimum(weights: list[int], count: int) -> int:
    """Return the weight of the fullest bin in the best partition."""
    return min(max(np.bincount(bins, weights, count)) for bins in product(range(count), repeat=len(weights)))


GROUPS = st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(1, 25), min_size=1, max_size=5)), max_size=10)
WEIGHTS = st.lists(st.integers(0, 60), max_size=30)


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    groups=GROUPS,
    ranks=st.integers(1, 5),
    budget=st.integers(1, 120),
    shared=st.booleans(),
    multiple=st.integers(1, 4),
    pair_cost=st.sampled_from([0.0, 0.01, 1.0]),
)
def test_packing_keeps_every_sample_once_the_budget_and_the_same_count(data, groups, ranks, budget, shared, multiple, pair_cost):
    batch = batch_of(groups)
    samples = np.arange(batch.samples)[:: data.draw(st.integers(1, 2))]
    shares = pack(batch, samples, ranks, budget, shared, multiple, pair_cost)
    assert len(shares) == ranks and len({len(share) for share in shares}) == 1
    assert len(shares[0]) >= 1 and len(shares[0]) % multiple == 0
    assert sorted(int(i) for share in shares for micro in share for i in micro) == samples.tolist()
    for micro in (micro for share in shares for micro in share):
        tokens = cut(batch, micro, torch.device("cpu"), shared).token_ids.numel()
        assert micro.tolist() == sorted(micro) and (tokens <= budget or len(micro) <= 1)
    for share in shares if not shared else []:
        lengths = [batch.lengths[micro].sum() for micro in share]
        assert lengths == sorted(lengths, reverse=True)
    shuffled = data.draw(st.permutations(samples.tolist()))
    assert lists(pack(batch, np.array(shuffled, np.int64), ranks, budget, shared, multiple, pair_cost)) == lists(shares)


def test_ties_are_broken_by_the_order_of_the_samples():
    assert lists(pack(plain(5, 5, 5, 5), np.arange(4), 2, 5, shared_prompts=False)) == [[[0], [3]], [[1], [2]]]


def test_the_longest_micro_batch_of_a_rank_comes_first():
    assert [totals([2, 9, 5], bins) for bins in place([2, 9, 5], [2, 9, 5], 1, 9)] == [[9, 7]]
    assert place([2, 9, 5, 7], [2, 9, 5, 7], 1, 9, count_multiple=4) == [[[1], [3], [2], [0]]]


def test_a_long_sample_does_not_enlarge_the_other_micro_batches():
    for rest, expected in (([3, 3, 2, 2, 2], [19, 6, 6]), ([3, 3, 2, 2], [19, 5, 5])):
        lengths = [19, *rest]
        assert [totals(lengths, bins) for bins in place(lengths, lengths, 1, 6)] == [expected]


def test_if_balancing_exceeds_the_budget_bins_are_filled_one_by_one():
    lengths = [3, 6, 2, 2, 3, 2]
    assert max(totals(lengths, partition(lengths, 2))) == 10
    assert [totals(lengths, bins) for bins in place(lengths, lengths, 1, 9)] == [[9, 9]]


def test_units_that_balanced_ranks_cannot_hold_are_packed_across_ranks():
    """Ranks of 5 + 5 + 4 and 6 + 4 + 3 are balanced, but the first does not fit into two micro-batches of 8."""
    lengths = [4, 6, 5, 3, 5, 4]
    assert sorted(sorted(lengths[i] for i in share) for share in partition(lengths, 2)) == [[3, 4, 6], [4, 5, 5]]
    assert [len(share) for share in place(lengths, lengths, 2, 8)] == [2, 2]


def fewest_bins(lengths: list[int], budget: int) -> int:
    """Compute it by dynamic programming over all sets of units: (bins, content of the last) of the best order in which to fill them."""
    best = [(0, budget)]
    for chosen in range(1, 2 ** len(lengths)):
        last = ((length, best[chosen ^ 1 << i]) for i, length in enumerate(lengths) if chosen >> i & 1)
        best.append(min((bins, held + length) if held + length <= budget else (bins + 1, length) for length, (bins, held) in last))
    return best[-1][0]


def test_the_number_of_micro_batches_follows_from_the_fewest_bins():
    random = np.random.default_rng(0)
    for _ in range(500):
        budget, ranks, multiple = int(random.integers(5, 14)), int(random.integers(1, 4)), int(random.integers(1, 3))
        lengths = random.integers(1, budget + 1, random.integers(1, 9)).tolist()
        fewest = -(-fewest_bins(lengths, budget) // (ranks * multiple)) * multiple
        assert len(place(lengths, lengths, ranks, budget, multiple)[0]) == fewest, (lengths, ranks, budget, multiple)


@pytest.mark.parametrize(
    ("weights", "count", "expected"),
    [
        ([8, 7, 6, 5, 4], 2, [14, 16]),
        ([91, 83, 74, 68, 57, 42, 39, 31, 23, 17], 3, [172, 174, 179]),
        ([97, 89, 71, 66, 52, 49, 37, 28, 20, 13, 5], 4, [126, 130, 133, 138]),
        ([95, 90, 84, 77, 63, 51, 45, 38, 26, 19, 11, 3], 5, [116, 117, 122, 122, 125]),
    ],
)
def test_differencing_is_that_of_karmarkar_and_karp(weights, count, expected):
    """The expected values are those of `karmarkar_karp` in the package numberpartitioning 0.0.2."""
    assert sorted(totals(weights, difference(weights, count))) == expected
    assert max(totals(weights, partition(weights, count))) <= max(expected)


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(0, 40), min_size=1, max_size=7), count=st.integers(1, 3))
def test_a_partition_is_near_the_best_one(weights, count):
    assert max(totals(weights, partition(weights, count))) <= (4 / 3 - 1 / (3 * count)) * optimum(weights, count) + 1e-9


@settings(max_examples=200, deadline=None)
@given(weights=WEIGHTS, count=st.integers(1, 6))
def test_no_exchange_would_lower_a_fullest_bin_above_the_bound(weights, count):
    bins = partition(weights, count)
    assert sorted(i for members in bins for i in members) == list(range(len(weights))) and len(bins) == count
    sums = totals(weights, bins)
    fullest = int(np.argmax(sums))
    if sums[fullest] <= max(weights, default=0) or sums[fullest] * count < sum(weights) + count:
        return  # as low as the largest weight and the mean allow
    for other in set(range(count)) - {fullest}:
        for given_away, taken in product([weights[i] for i in bins[fullest]], [0, *(weights[i] for i in bins[other])]):
            moved = given_away - taken
            assert max(sums[fullest] - moved, sums[other] + moved) >= sums[fullest]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), count=st.integers(1, 5), each=st.integers(1, 5))
def test_equal_counts_give_every_bin_the_same_number(data, count, each):
    weights = data.draw(st.lists(st.integers(0, 60), min_size=count * each, max_size=count * each))
    bins = partition(weights, count, equal_counts=True)
    assert [len(members) for members in bins] == [each] * count
    assert sorted(i for members in bins for i in members) == list(range(len(weights)))
    # In descending order, `count` at a time: no bin differs from another by more than the largest spread of those.
    ordered = sorted(weights, reverse=True)
    spreads = [ordered[i] - ordered[i + count - 1] for i in range(0, len(ordered), count)]
    assert max(totals(weights, bins)) - sum(weights) / count <= max(spreads)


@settings(max_examples=100, deadline=None)
@given(lengths=WEIGHTS, budget=st.integers(1, 60))
def test_best_fit_leaves_no_two_bins_that_could_be_merged(lengths, budget):
    bins = best_fit(lengths, budget)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    sums = totals(lengths, bins)
    assert all(total <= budget or len([i for i in members if lengths[i]]) == 1 for total, members in zip(sums, bins, strict=True))
    assert all(a + b > budget for n, a in enumerate(sums) for b in sums[:n])


def test_best_fit_prefers_the_fullest_bin_that_takes_it():
    assert best_fit([6, 5, 4, 3], 10) == [[0, 2], [1, 3]]
    assert best_fit([5, 6, 4, 3], 10) == [[1, 2], [0, 3]]
    assert best_fit([7, 6, 3, 2], 10) == [[0, 2], [1, 3]]


def measured(packing, batch: TrainBatch, ranks: int, budget: int, shared: bool = False) -> tuple[int, PackingMetrics]:
    shares = packing(batch, np.arange(batch.samples), ranks, budget, shared)
    return len(shares[0]), measure(batch, shares, budget, shared)


@pytest.mark.parametrize("name", bench.DISTRIBUTIONS)
def test_no_worse_than_longest_first_to_the_lightest(name):
    """Compared in the number of micro-batches; if that is equal, in balance; and usually better, if lengths differ."""
    random = np.random.default_rng(1)
    lower = 0
    for samples, ranks in ((8, 2), (32, 8), (64, 2), (128, 16), (256, 32), (512, 64)):
        for budget in (8192, 16384):
            batch = bench.plain(bench.DISTRIBUTIONS[name](random, samples, 8192))
            count, figures = measured(pack, batch, ranks, budget)
            greedy_count, greedy = measured(lambda batch, every, *rest: bench.greedy(batch, *rest), batch, ranks, budget)
            assert (count, figures.fullest) <= (greedy_count, greedy.fullest), (samples, ranks, budget)
            lower += figures.fullest < greedy.fullest
    assert name == "equal" or lower >= 4


def test_groups_that_share_prompts_are_split_if_ranks_would_be_idle():
    batch = batch_of([(2, [9] * 4), (2, [9] * 4)])
    for ranks, fullest, tokens in ((1, 68, 68), (2, 34, 68), (4, 18, 72), (8, 10, 80)):
        count, figures = measured(pack, batch, ranks, 1000, shared=True)
        assert (count, figures.fullest, figures.tokens) == (1, fullest, tokens)


def test_work_is_balanced_over_ranks_if_attention_has_a_cost():
    """8 tokens have 36 pairs, 4 have 10: if a pair costs as much as a token, 44 and 14."""
    batch = plain(8, 4, 4, 4, 4)
    by_tokens = lists(pack(batch, np.arange(5), 2, 100, shared_prompts=False))
    assert [sum(len(micro) for micro in share) for share in by_tokens] in ([2, 3], [3, 2])
    by_work = pack(batch, np.arange(5), 2, 16, shared_prompts=False, pair_cost=1.0)
    assert sorted(lists(by_work)) == [[[0]], [[1, 2, 3, 4]]]
    figures = measure(batch, by_work, 100, shared_prompts=False, pair_cost=1.0)
    assert (figures.tokens, figures.fullest, figures.mean) == (24, 56, 50)


def test_pairs_of_a_shared_prompt_count_once():
    """Prompt 2: 3 pairs. Responses of which 3 and 1 tokens are read: 3 · 2 + 6 and 1 · 2 + 1."""
    batch = batch_of([(2, [4, 2])])
    shares = [[np.array([0, 1])]]
    assert measure(batch, shares, 10, shared_prompts=True, pair_cost=1.0).mean == 6 + 18
    assert measure(batch, shares, 10, shared_prompts=False, pair_cost=1.0).mean == 8 + 15 + 6


SHARES = [[np.array([0, 1]), np.array([2])], [np.array([3]), np.zeros(0, np.int64)]]


def test_metrics_of_a_packing_match_a_hand_calculation():
    """Ranks of (5 + 4, 6) and (10, 0) tokens; budget 12."""
    figures = measure(plain(5, 4, 6, 10), SHARES, 12, shared_prompts=False)
    assert figures == PackingMetrics(tokens=25, room=48, mean=12.5, fullest=15, lockstep=16)
    assert (figures.fill, figures.imbalance, figures.lockstep_imbalance) == (25 / 48, 1.2, 1.28)


def test_metrics_count_a_shared_prompt_once_per_micro_batch():
    """With prompt 3, of responses 2, 1, 3 and 4 tokens are read: 3 + 2 + 1, 3 + 3 and 3 + 4."""
    figures = measure(batch_of([(3, [3, 2, 4, 5])]), SHARES, 12, shared_prompts=True)
    assert figures == PackingMetrics(tokens=19, room=48, mean=9.5, fullest=12, lockstep=13)


def test_metrics_of_mini_batches_add_up():
    first = measure(plain(5, 4, 6, 10), SHARES, 12, shared_prompts=False)
    second = measure(plain(1, 1, 1, 7), SHARES, 12, shared_prompts=False)
    both = sum([first, second], PackingMetrics())
    assert both == PackingMetrics(tokens=35, room=96, mean=17.5, fullest=22, lockstep=24)
    assert both.imbalance == 22 / 17.5, "each mini-batch waits for its own fullest rank"


def test_metrics_of_an_empty_packing():
    for figures in (PackingMetrics(), measure(plain(), [[np.zeros(0, np.int64)]] * 2, 8, shared_prompts=False)):
        assert (figures.fill, figures.imbalance, figures.lockstep_imbalance) == (0, 1, 1)
