"""Flat batches, mini-batches, and the micro-batches built from them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from megatron_aspo.data.batch import make_train_batch, mini_batches
from megatron_aspo.data.records import Generation, Group, Prompt, Sample, VersionSpan
from megatron_aspo.trainer.micro_batch import PackingRules, cut, cut_all
from megatron_aspo.weights.layout import ParallelSizes


def group(number: int, prompt: list[int], responses: list[list[int]], position: int = 0) -> Group:
    owner = Prompt(f"p{number}", tuple(prompt), "", 0, "test", position=position)
    samples = [
        Sample(
            owner,
            i,
            seed=0,
            generation=Generation(np.array(r, np.int32), -0.5 - np.arange(len(r), dtype=np.float32), (VersionSpan(0, 0, len(r)),), "stop"),
            text="",
            reward=float(i),
            shaped_reward=10.0 + i,
        )
        for i, r in enumerate(responses)
    ]
    return Group(owner, tuple(samples))


GROUPS = [group(0, [5, 6, 7], [[1, 2], [3]]), group(1, [9], [[4, 4, 4], [8, 1]])]


def test_a_batch_concatenates_the_samples():
    batch = make_train_batch(GROUPS, "shuffled", 1, overlong_filter=False)
    assert batch.token_ids.tolist() == [5, 6, 7, 1, 2, 5, 6, 7, 3, 9, 4, 4, 4, 9, 8, 1]
    assert batch.offsets.tolist() == [0, 5, 9, 13, 16]
    assert batch.response_offsets.tolist() == [0, 2, 3, 6, 8]
    assert batch.rollout_logprobs.tolist() == [-0.5, -1.5, -0.5, -0.5, -1.5, -2.5, -0.5, -1.5]
    assert batch.rewards.tolist() == [10.0, 11.0, 10.0, 11.0]
    assert batch.mask.all() and batch.counted.tolist() == [2, 1, 3, 2]
    assert batch.groups.tolist() == [0, 0, 1, 1]
    assert batch.names == ("p0[0]", "p0[1]", "p1[0]", "p1[1]")


def test_a_batch_without_groups_is_empty():
    batch = make_train_batch([], "shuffled", 1, overlong_filter=False)
    assert batch.samples == 0 and batch.response_offsets[-1] == 0
    assert mini_batches(batch.groups, 4, epochs=2, seed=0) == []


def test_truncated_responses_do_not_count_with_the_overlong_filter():
    one, two = GROUPS
    cut_off = replace(one.samples[1], generation=replace(one.samples[1].generation, finish_reason="length"))
    groups = [replace(one, samples=(one.samples[0], cut_off)), two]
    batch = make_train_batch(groups, "shuffled", 1, overlong_filter=True)
    assert batch.mask.tolist() == [True, True, False, True, True, True, True, True] and batch.counted.tolist() == [2, 0, 3, 2]
    assert batch.rewards.tolist() == [10.0, 11.0, 10.0, 11.0]
    assert make_train_batch(groups, "shuffled", 1, overlong_filter=False).mask.all()


def test_data_order_sorts_by_position_and_counts_a_multiple_of_the_ranks():
    groups = [group(0, [5], [[1], [2]], position=9), group(1, [6], [[3, 3], [4]], position=2), group(2, [7], [[5]], position=5)]
    batch = make_train_batch(groups, "data_index", 2, overlong_filter=False)
    assert batch.names == ("p1[0]", "p1[1]", "p2[0]", "p0[0]", "p0[1]")
    assert batch.counted.tolist() == [2, 1, 1, 1, 0]
    assert make_train_batch(groups, "data_index", 5, overlong_filter=False).mask.all()
    assert make_train_batch(groups, "shuffled", 2, overlong_filter=False).names[0] == "p0[0]"


def test_data_order_is_the_same_in_every_epoch():
    batches = mini_batches(np.repeat(np.arange(5), 2), 2, epochs=2, seed=None)
    assert [b.tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] * 2


def test_a_micro_batch_pairs_each_target_with_the_token_before_it():
    batch = make_train_batch(GROUPS, "shuffled", 1, overlong_filter=False)
    micro = cut(batch, np.array([1, 2]), torch.device("cpu"))
    assert micro.token_ids[0].tolist() == [5, 6, 7, 9, 4, 4]
    assert micro.position_ids[0].tolist() == [0, 1, 2, 0, 1, 2]
    assert micro.cu_seqlens.tolist() == [0, 3, 6] and micro.lengths == [3, 3]
    assert micro.predictors.tolist() == [2, 3, 4, 5] and micro.targets.tolist() == [3, 4, 4, 4]
    assert micro.response_index.tolist() == [2, 3, 4, 5]
    assert micro.offsets == [0, 1, 4]


def test_an_empty_micro_batch_has_one_token_that_nothing_attends_to():
    micro = cut(make_train_batch(GROUPS, "shuffled", 1, overlong_filter=False), np.zeros(0, np.int64), torch.device("cpu"))
    assert micro.token_ids.shape == (1, 1) and micro.cu_seqlens.tolist() == [0, 1] and micro.offsets == [0]
    assert micro.predictors.numel() == micro.targets.numel() == 0


def test_every_epoch_visits_every_group_once_in_a_different_order():
    groups = np.repeat(np.arange(7), 2)
    batches = mini_batches(groups, 3, epochs=2, seed=1)
    assert [len(b) for b in batches] == [6, 6, 2, 6, 6, 2]
    for epoch in (batches[:3], batches[3:]):
        assert sorted(np.concatenate(epoch)) == list(range(14))
        assert all(set(groups[b]) & set(groups[c]) == set() for b in epoch for c in epoch if b is not c)
    assert any(not np.array_equal(a, b) for a, b in zip(batches[:3], batches[3:]))
    assert all(np.array_equal(a, b) for a, b in zip(batches, mini_batches(groups, 3, epochs=2, seed=1)))


def test_responses_that_share_a_prompt_follow_it_once():
    batch = make_train_batch(GROUPS, "shuffled", 1, overlong_filter=False)
    micro = cut(batch, np.arange(4), torch.device("cpu"), shared_prompts=True)
    assert micro.token_ids[0].tolist() == [5, 6, 7, 1, 9, 4, 4, 8]
    assert micro.position_ids[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 1]
    assert micro.cu_seqlens.tolist() == [0, 4, 8]
    assert [b.tolist() for b in micro.branches] == [[-1, -1, -1, 0], [-1, 0, 0, 1]]
    assert micro.targets.tolist() == [1, 2, 3, 4, 4, 4, 8, 1]
    assert micro.predictors.tolist() == [2, 3, 2, 4, 5, 6, 4, 7]
    assert micro.offsets == [0, 2, 3, 6, 8]


CPU = torch.device("cpu")


def test_padding_rules_follow_the_layout():
    sizes = ParallelSizes(tensor=2, pipeline=4, data=3, virtual=2, context=2)
    rules = PackingRules.of(sizes, sizes.coordinates(2), sequence_parallel=True)
    assert rules == PackingRules(context=2, context_rank=1, multiple=2, count_multiple=4, equal_lengths=True)
    assert PackingRules.of(sizes, sizes.coordinates(2), sequence_parallel=False).multiple == 1
    plain = ParallelSizes(tensor=2, pipeline=4, data=3)
    assert PackingRules.of(plain, plain.coordinates(9), sequence_parallel=False) == PackingRules()


@pytest.mark.parametrize(
    ("context", "sequence", "segment", "total"), [(1, 1, 1, 1), (1, 4, 1, 4), (2, 1, 4, 4), (2, 2, 4, 4), (2, 4, 4, 8), (3, 4, 6, 12)]
)
def test_lengths_are_multiples_that_every_rank_can_share(context, sequence, segment, total):
    """2 · CP for segments; for the whole also TP · CP under sequence parallelism."""
    rules = PackingRules(context=context, multiple=sequence)
    assert (rules.segment_tokens(1), rules.total_tokens(1), rules.total_tokens(0)) == (segment, total, total)
    assert rules.segment_tokens(2 * segment) == 2 * segment and rules.total_tokens(2 * total + 1) == 3 * total


def test_padding_follows_what_it_pads():
    batch = make_train_batch(GROUPS, "shuffled", 1, overlong_filter=False)
    micro = cut(batch, np.array([0, 1, 2]), CPU, rules=PackingRules(multiple=4))
    assert micro.token_ids[0].tolist() == [5, 6, 7, 1, 5, 6, 7, 9, 4, 4, 0, 0]
    assert micro.cu_seqlens.tolist() == [0, 4, 7, 10, 12] and micro.position_ids[0, -2:].tolist() == [0, 1]
    micro = cut(batch, np.arange(4), CPU, shared_prompts=True, rules=PackingRules(multiple=5))
    assert micro.cu_seqlens.tolist() == [0, 4, 8, 10]
    assert [b.tolist() for b in micro.branches] == [[-1, -1, -1, 0], [-1, 0, 0, 1], [-1, -1]]


def test_a_context_parallel_rank_holds_a_chunk_and_the_mirrored_one_of_each_segment():
    batch = make_train_batch([group(0, [1, 2, 3], [[4, 5, 6, 7], [8]])], "shuffled", 1, overlong_filter=False)
    first, second = (cut(batch, np.arange(2), CPU, rules=PackingRules(context=2, context_rank=r)) for r in range(2))
    # Segments 1 2 | 3 4 | 5 6 | pad pad and 1 | 2 | 3 | pad.
    assert first.token_ids[0].tolist() == [1, 2, 0, 0, 1, 0] and second.token_ids[0].tolist() == [3, 4, 5, 6, 2, 3]
    assert first.cu_seqlens.tolist() == second.cu_seqlens.tolist() == [0, 8, 12]
    assert first.targets.tolist() == [] and second.targets.tolist() == [4, 5, 6, 7, 8]
    assert second.predictors.tolist() == [0, 1, 2, 3, 5] and second.held.tolist() == [0, 1, 2, 3, 4]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), context=st.integers(2, 4), sequence=st.integers(1, 4), shared=st.booleans(), equal=st.booleans())
def test_context_parallel_ranks_hold_every_token_and_every_target_once(data, context, sequence, shared, equal):
    """Concatenated and reordered, the ranks' tokens are those of a single rank, except for padding."""
    sizes = st.tuples(st.integers(1, 20), st.lists(st.integers(1, 25), min_size=1, max_size=4))
    groups = [
        group(n, list(range(1, prompt + 1)), [list(range(50, 50 + length)) for length in responses])
        for n, (prompt, responses) in enumerate(data.draw(st.lists(sizes, min_size=1, max_size=5)))
    ]
    batch = make_train_batch(groups, "shuffled", 1, overlong_filter=False)
    packs = [np.arange(batch.samples)[: batch.samples // 2], np.arange(batch.samples)]
    rules = [PackingRules(context=context, context_rank=r, multiple=sequence, equal_lengths=equal) for r in range(context)]
    ranks = [cut_all(batch, packs, CPU, shared, r) for r in rules]
    assert not equal or len({micro.tokens for micros in ranks for micro in micros}) == 1
    for number, samples in enumerate(packs):
        shares = [micros[number] for micros in ranks]
        whole = cut(batch, samples, CPU, shared)
        assert {share.token_ids.shape for share in shares} == {(1, shares[0].tokens // context)}
        assert shares[0].token_ids.numel() % sequence == 0 and bool((shares[0].cu_seqlens % (2 * context) == 0).all())
        tokens = torch.cat([share.token_ids[0] for share in shares])[shares[0].order]
        for share in shares:
            assert torch.equal(tokens[share.local], share.token_ids[0])
            # The token that predicts a target is one position before it.
            before = share.position_ids[0, share.local][share.predictors] + 1
            positions = torch.cat([torch.arange(n, n + stop - start) for n, start, stop in spans(batch, samples)] or [torch.zeros(0)])
            assert torch.equal(before, positions[share.held].long())
        kept = [i for a, b, n in zip(shares[0].cu_seqlens[:-1], whole.cu_seqlens[:-1], whole.cu_seqlens.diff()) for i in range(a, a + n)]
        if len(samples):
            assert torch.equal(tokens[kept], whole.token_ids[0]) and torch.equal(shares[0].position_ids[0, kept], whole.position_ids[0])
        held = torch.cat([share.held for share in shares])
        assert torch.equal(torch.cat([share.targets for share in shares])[held.argsort()], whole.targets)
        assert held.sort().values.tolist() == list(range(len(whole.targets)))


def spans(batch, samples):
    """Return (prompt length, first, last) of each sample's response tokens."""
    return [(int(batch.prompt_lengths[i]), int(batch.response_offsets[i]), int(batch.response_offsets[i + 1])) for i in samples]
