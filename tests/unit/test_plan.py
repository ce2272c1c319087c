"""Transfer plans, compared with set arithmetic on element ids and with both frameworks' rules written without the table."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_aspo.common.errors import UserError
from megatron_aspo.rollout.engine_layout import EngineHoldings, EngineSizes
from megatron_aspo.sync.plan import Move, RankNodes, count_least_traffic, count_traffic, fill_buckets, plan_moves
from megatron_aspo.weights.families import tensor_shapes
from megatron_aspo.weights.holdings import TrainingHoldings
from megatron_aspo.weights.layout import ModelDims, ParallelSizes
from tests.unit.test_layout import dims, family_dims, has_experts, layouts, megatron_parameters, numbered

Ids = set[int]


def engine_ids(family: str, d: ModelDims, whole: dict[str, np.ndarray], sizes: EngineSizes, rank: int) -> dict[str, Ids]:
    """Return tensor → ids of the elements that an engine worker of this tensor-parallel rank holds, as vLLM documents its layers."""
    tp = sizes.tensor

    def heads(matrix: np.ndarray, count: int) -> np.ndarray:
        by_head = matrix.reshape(count, d.head_dim, -1)
        copies = max(1, tp // count)
        return np.split(by_head.repeat(copies, axis=0), tp)[rank]

    def held(name: str, matrix: np.ndarray) -> np.ndarray:
        part = name.split(".")[-2]
        if part in ("embed_tokens", "lm_head"):
            padded = np.pad(matrix, ((0, -len(matrix) % 64), (0, 0)), constant_values=-1)
            return np.split(padded, tp)[rank]
        if ".experts." in name and sizes.expert_parallel:
            owners = np.array_split(np.arange(d.experts), tp)  # as even as can be, the first have more
            expert = int(name.split(".experts.")[1].split(".")[0])
            return matrix if expert in owners[rank] else matrix[:0]
        if part == "q_proj":
            return heads(matrix, d.heads)
        if part in ("k_proj", "v_proj"):
            return heads(matrix, d.kv_heads)
        if part in ("o_proj", "down_proj", "w2"):
            return np.split(matrix, tp, axis=1)[rank]
        if part in ("gate_proj", "up_proj", "w1", "w3"):
            return np.split(matrix, tp)[rank]
        return matrix

    return {name: set(held(name, matrix).ravel().tolist()) - {-1} for name, matrix in whole.items()}


def training_ids(family: str, d: ModelDims, whole: dict[str, np.ndarray], sizes: ParallelSizes, rank: int) -> dict[str, Ids]:
    ids = {i for parameter in megatron_parameters(family, d, whole, sizes, rank).values() for i in parameter.ravel().tolist()}
    return {name: ids & set(matrix.ravel().tolist()) for name, matrix in whole.items()}


@st.composite
def transfers(draw) -> tuple[str, ModelDims, ParallelSizes, EngineSizes, RankNodes]:
    family, d, sizes = draw(layouts())
    expert_parallel = has_experts(family) and draw(st.booleans())
    fitting = []
    for tensor in (1, 2, 3, 4):
        try:
            EngineHoldings(family, d, EngineSizes(tensor, expert_parallel))
            fitting.append(tensor)
        except UserError:
            pass
    engines = EngineSizes(draw(st.sampled_from(fitting)), expert_parallel, draw(st.integers(1, 3)))
    nodes = draw(st.lists(st.integers(0, 2), min_size=sizes.world, max_size=sizes.world))
    device_of = {}
    free = list(range(sizes.world))
    for worker in range(engines.world):
        with_trainer = free and draw(st.booleans())
        if with_trainer:
            device_of[sizes.world + worker] = free.pop(draw(st.integers(0, len(free) - 1)))
        nodes.append(nodes[device_of[sizes.world + worker]] if with_trainer else draw(st.integers(0, 3)))
    return family, d, sizes, engines, RankNodes(tuple(nodes), device_of)


def plans_of_all(family: str, d: ModelDims, sizes: ParallelSizes, engines: EngineSizes, where: RankNodes) -> dict[int, list[Move]]:
    tensors = list(tensor_shapes(family, d))
    plans = {}
    for rank in range(sizes.world + engines.world):
        # Each rank derives its own.
        plans[rank] = plan_moves(rank, tensors, TrainingHoldings(family, d, sizes), EngineHoldings(family, d, engines), where)
    return plans


def elements(moves: Iterable[Move]) -> int:
    return sum(int(np.prod([stop - start for start, stop in move.box])) for move in moves)


def part(whole: np.ndarray, move: Move) -> np.ndarray:
    return whole[tuple(slice(*edge) for edge in move.box)]


@settings(max_examples=250, deadline=None)
@given(transfers())
def test_every_target_gets_each_of_its_elements_once_from_a_rank_that_has_it(transfer):
    family, d, sizes, engines, where = transfer
    whole = numbered(tensor_shapes(family, d))
    plans = plans_of_all(*transfer)
    has = {rank: training_ids(family, d, whole, sizes, rank) for rank in range(sizes.world)}
    needs = {sizes.world + w: engine_ids(family, d, whole, engines, w % engines.tensor) for w in range(engines.world)}

    # All ranks derive the same plan: the other end expects what one end sends, in the same order.
    between = defaultdict(lambda: [[], []])
    for rank, moves in plans.items():
        for move in moves:
            assert rank in (move.source, move.target)
            if rank == move.source:
                between[move.source, move.target][0].append(move)
            if rank == move.target:
                between[move.source, move.target][1].append(move)
    assert all(sent == expected for sent, expected in between.values())

    got = {rank: Counter() for rank in needs}
    sent = across = 0
    for step in (0, 1):
        for moves, _ in between.values():
            for move in (m for m in moves if m.step == step):
                ids = part(whole[move.tensor], move).ravel().tolist()
                holding = has[move.source][move.tensor] if step == 0 else got[move.source]
                assert all(i in holding for i in ids)
                got[move.target].update(ids)
                if where.device_of.get(move.target) != move.source:
                    sent += len(ids)
                    across += len(ids) * (where.node_of[move.source] != where.node_of[move.target])
    for rank, tensors in needs.items():
        assert got[rank] == Counter(i for ids in tensors.values() for i in ids)  # nothing missing, nothing twice, nothing else

    # No plan could send fewer elements, in all or between nodes.
    def union(*held: dict[str, Ids]) -> Ids:
        return {i for tensors in held for ids in tensors.values() for i in ids}

    there = {rank: has[where.device_of[rank]] for rank in where.device_of}
    assert sent == sum(len(union(need) - union(there.get(rank, {}))) for rank, need in needs.items())
    least_across = 0
    for node in set(where.node_of):
        wanted = union(*(need for rank, need in needs.items() if where.node_of[rank] == node))
        least_across += len(wanted - union(*(held for rank, held in has.items() if where.node_of[rank] == node)))
    assert across == least_across

    # The summary adds up what the ranks do.
    source, target = TrainingHoldings(family, d, sizes), EngineHoldings(family, d, engines)
    added = count_traffic(list(whole), source, target, where)
    for rank, moves in plans.items():
        for mine, theirs, away, figures in (
            ("source", "target", False, added.sent),
            ("target", "source", False, added.received),
            ("source", "target", True, added.sent_between_nodes),
            ("target", "source", True, added.received_between_nodes),
        ):
            counted = [
                m
                for m in moves
                if getattr(m, mine) == rank
                and where.device_of.get(m.target) != m.source
                and (not away or where.node_of[rank] != where.node_of[getattr(m, theirs)])
            ]
            assert figures[rank] == elements(counted)
    assert count_least_traffic(list(whole), source, target, where) == sent


CASES = {
    "dense": ("Qwen2ForCausalLM", {}, ParallelSizes(tensor=2, pipeline=2, data=3)),
    "tied": ("Qwen3ForCausalLM", {"tied": True}, ParallelSizes(tensor=2, pipeline=2, data=2)),
    "experts": ("Qwen3MoeForCausalLM", {}, ParallelSizes(tensor=2, pipeline=2, data=4, expert=4, expert_tensor=1)),
    "context": ("LlamaForCausalLM", {}, ParallelSizes(tensor=2, data=2, context=2)),
}


@pytest.mark.parametrize("engines", [EngineSizes(1), EngineSizes(2, engines=3), EngineSizes(4, engines=2)], ids=["1", "3x2", "2x4"])
@pytest.mark.parametrize("name", CASES)
def test_replicas_send_evenly(name, engines):
    family, changes, sizes = CASES[name]
    d = family_dims(family, experts=8, moe_ffn=96, hidden=96, heads=8, kv_heads=4, head_dim=16, ffn=96, vocab=640, **changes)
    nodes = [rank // 4 for rank in range(sizes.world)] + [100 + worker // 4 for worker in range(engines.world)]
    plans = plans_of_all(family, d, sizes, engines, RankNodes(tuple(nodes), {}))
    sent = {rank: elements(move for move in plans[rank] if move.source == rank) for rank in range(sizes.world)}
    # Ranks with the same coordinates in the model hold the same dense weights, and equally many experts.
    stages = defaultdict(list)
    for rank in sent:
        at = sizes.coordinates(rank)
        stages[at.pipeline, at.tensor].append(sent[rank])
    for loads in stages.values():
        assert max(loads) <= 1.05 * np.mean(loads)
        assert min(loads) >= 0.95 * np.mean(loads)


def test_a_node_is_sent_one_copy_which_its_targets_pass_on_in_equal_parts():
    sizes, engines = ParallelSizes(), EngineSizes(1, engines=4)
    d = dims(hidden=64, vocab=256, head_dim=8)
    where = RankNodes((0, 1, 1, 1, 2), {})
    plans = plans_of_all("LlamaForCausalLM", d, sizes, engines, where)
    total = sum(int(np.prod(shape)) for shape in tensor_shapes("LlamaForCausalLM", d).values())

    assert elements(plans[0]) == 2 * total  # one copy for each node
    for worker in (1, 2, 3):
        received = [move for move in plans[worker] if move.target == worker]
        assert elements(received) == total
        assert elements(m for m in received if m.source == 0) == pytest.approx(total / 3, rel=0.05)
        assert elements(m for m in plans[worker] if m.source == worker) == pytest.approx(2 * total / 3, rel=0.05)


@settings(max_examples=100, deadline=None)
@given(transfers(), st.integers(1, 3000))
def test_buckets_hold_every_tensor_once_and_no_more_than_their_size_on_any_target(transfer, bound):
    family, d, sizes, engines, _ = transfer
    whole = numbered(tensor_shapes(family, d))
    order = TrainingHoldings(family, d, sizes).in_turns()
    assert sorted(order) == sorted(whole)
    buckets = fill_buckets(order, EngineHoldings(family, d, engines), lambda tensor: whole[tensor].size, bound)
    assert list(itertools.chain(*buckets)) == order
    held = [engine_ids(family, d, whole, engines, rank) for rank in range(engines.tensor)]

    def load(tensors: list[str]) -> int:
        return max(sum(whole[tensor].size for tensor in tensors if ids[tensor]) for ids in held)

    for bucket, after in itertools.pairwise([*buckets, None]):
        assert load(bucket) <= bound or len(bucket) == 1
        assert after is None or load([*bucket, after[0]]) > bound


def test_consecutive_layers_in_the_sending_order_are_on_different_stages():
    sizes = ParallelSizes(pipeline=2, virtual=2)
    order = TrainingHoldings("LlamaForCausalLM", dims(layers=8), sizes).in_turns()
    layers = [int(name.split(".")[2]) for name in order if ".layers." in name]
    # Stage 0 has layers 0 1 and 4 5, stage 1 has 2 3 and 6 7.
    assert [layer for layer, _ in itertools.groupby(layers)] == [0, 2, 1, 3, 4, 6, 5, 7]
    assert (order[0], order[-1]) == ("model.embed_tokens.weight", "lm_head.weight")


def test_engine_sizes_that_do_not_fit_the_model_are_refused():
    with pytest.raises(UserError, match=r"^tensor_parallel=4 does not divide the model's 6 attention heads"):
        EngineHoldings("LlamaForCausalLM", dims(heads=6, kv_heads=6), EngineSizes(4))
    moe = family_dims("Qwen3MoeForCausalLM", experts=2, moe_ffn=6)
    for sizes, what in ((EngineSizes(4), "6 feed-forward channels of an expert"), (EngineSizes(4, True), "cannot share out 2 experts")):
        with pytest.raises(UserError, match=what):
            EngineHoldings("Qwen3MoeForCausalLM", moe, sizes)


def test_context_parallel_ranks_are_replicas():
    holdings = TrainingHoldings("LlamaForCausalLM", dims(), ParallelSizes(tensor=2, context=2, data=2))
    assert holdings.of("model.norm.weight").ranks == (tuple(range(8)),)
    split = holdings.of("model.layers.1.mlp.down_proj.weight")
    assert split.ranks == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert list(itertools.chain(*split.boxes)) == [(0, 24), (0, 8), (0, 24), (8, 16)]
