"""Flat batches, mini-batches and packing."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings, strategies as st

from megatron_aspo.data.batch import make_train_batch, mini_batches, pack
from megatron_aspo.data.records import Generation, Group, Prompt, Sample, VersionSpan
from megatron_aspo.trainer.micro_batch import cut


def group(number: int, prompt: list[int], responses: list[list[int]], place: int = 0) -> Group:
    owner = Prompt(f"p{number}", tuple(prompt), "", 0, "test", place=place)
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


def test_a_batch_holds_the_samples_one_after_another():
    batch = make_train_batch(GROUPS, "shuffled", 1, overlong_filter=False)
    assert batch.token_ids.tolist() == [5, 6, 7, 1, 2, 5, 6, 7, 3, 9, 4, 4, 4, 9, 8, 1]
    assert batch.offsets.tolist() == [0, 5, 9, 13, 16]
    assert batch.response_offsets.tolist() == [0, 2, 3, 6, 8]
    assert batch.rollout_logprobs.tolist() == [-0.5, -1.5, -0.5, -0.5, -1.5, -2.5, -0.5, -1.5]
    assert batch.rewards.tolist() == [10.0, 11.0, 10.0, 11.0]
    assert batch.mask.all() and batch.counted.tolist() == [2, 1, 3, 2]
    assert batch.groups.tolist() == [0, 0, 1, 1]
    assert batch.names == ("p0[0]", "p0[1]", "p1[0]", "p1[1]")


def test_a_batch_of_no_group_is_empty():
    batch = make_train_batch([], "shuffled", 1, overlong_filter=False)
    assert batch.samples == 0 and batch.response_offsets[-1] == 0
    assert mini_batches(batch.groups, 4, epochs=2, seed=0) == []


def test_cut_off_responses_count_nowhere_with_the_overlong_filter():
    one, two = GROUPS
    cut_off = replace(one.samples[1], generation=replace(one.samples[1].generation, finish_reason="length"))
    groups = [replace(one, samples=(one.samples[0], cut_off)), two]
    batch = make_train_batch(groups, "shuffled", 1, overlong_filter=True)
    assert batch.mask.tolist() == [True, True, False, True, True, True, True, True] and batch.counted.tolist() == [2, 0, 3, 2]
    assert batch.rewards.tolist() == [10.0, 11.0, 10.0, 11.0]
    assert make_train_batch(groups, "shuffled", 1, overlong_filter=False).mask.all()


def test_data_order_sorts_by_place_and_counts_a_multiple_of_the_ranks():
    groups = [group(0, [5], [[1], [2]], place=9), group(1, [6], [[3, 3], [4]], place=2), group(2, [7], [[5]], place=5)]
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
    assert micro.cu_seqlens.tolist() == [0, 3, 6] and micro.max_seqlen == 3
    assert micro.predictors.tolist() == [2, 3, 4, 5] and micro.targets.tolist() == [3, 4, 4, 4]
    assert micro.response_index.tolist() == [2, 3, 4, 5]
    assert micro.offsets == [0, 1, 4]


def test_an_empty_micro_batch_has_one_token_that_nothing_looks_at():
    micro = cut(make_train_batch(GROUPS, "shuffled", 1, overlong_filter=False), np.zeros(0, np.int64), torch.device("cpu"))
    assert micro.token_ids.shape == (1, 1) and micro.cu_seqlens.tolist() == [0, 1] and micro.offsets == [0]
    assert micro.predictors.numel() == micro.targets.numel() == 0


def test_every_epoch_visits_every_group_once_in_an_order_of_its_own():
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


@settings(max_examples=200, deadline=None)
@given(data=st.data(), ranks=st.integers(1, 5), budget=st.integers(1, 120), shared=st.booleans())
def test_packing_keeps_every_sample_once_the_budget_and_the_same_count(data, ranks, budget, shared):
    sizes = st.tuples(st.integers(1, 30), st.lists(st.integers(1, 25), min_size=1, max_size=5))
    groups = [
        group(n, [0] * prompt, [[0] * length for length in responses])
        for n, (prompt, responses) in enumerate(data.draw(st.lists(sizes, max_size=10)))
    ]
    batch = make_train_batch(groups, "shuffled", 1, overlong_filter=False)
    samples = np.arange(batch.samples)[:: data.draw(st.integers(1, 2))]
    shares = pack(batch, samples, ranks, budget, shared)
    assert len(shares) == ranks and len({len(share) for share in shares}) == 1 and len(shares[0]) >= 1
    placed = [int(i) for share in shares for p in share for i in p]
    assert sorted(placed) == samples.tolist()
    for micro in (p for share in shares for p in share):
        tokens = cut(batch, micro, torch.device("cpu"), shared).token_ids.numel()
        assert tokens <= budget or len(micro) <= 1
