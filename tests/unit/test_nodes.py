"""Which rank and which engine is on which node."""

import random

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.rollout.engine_layout import EngineSizes
from megatron_aspo.runtime.nodes import NodeShare, ranks_by_node, shares_of_nodes


@pytest.mark.parametrize("seed", range(5))
def test_tensor_parallel_groups_are_within_a_node_in_the_order_of_its_devices(seed):
    places = [(node, str(device)) for node in "abc" for device in (*range(8), 10, 11)]
    random.Random(seed).shuffle(places)
    order = ranks_by_node(places, tensor=2)
    assert sorted(order) == list(range(30))
    ranks = [places[process] for process in order]
    for first in range(0, 30, 2):
        assert ranks[first][0] == ranks[first + 1][0]
    for node in "abc":
        assert [int(device) for home, device in ranks if home == node] == [*range(8), 10, 11]


def test_processes_of_one_node_without_devices_keep_their_order():
    assert ranks_by_node([("a", "")] * 5, tensor=4) == [0, 1, 2, 3, 4]


def test_a_group_that_would_span_nodes_is_refused():
    places = [("a", "0"), ("b", "0"), ("a", "1"), ("b", "1"), ("a", "2"), ("b", "2")]
    with pytest.raises(UserError, match=r"of 6 training ranks 3 are on one node, which is no multiple of trainer.tensor_parallel=2"):
        ranks_by_node(places, tensor=2)
    assert ranks_by_node(places, tensor=3) == [0, 2, 4, 1, 3, 5]


def test_nodes_are_filled_with_ranks_then_engines():
    assert shares_of_nodes(2, ranks=8, tensor=4, engines=EngineSizes(tensor=2, engines=4), colocated=False) == [
        NodeShare(range(8), ()),
        NodeShare(range(8, 8), (0, 1, 2, 3)),
    ]
    assert shares_of_nodes(4, ranks=6, tensor=3, engines=EngineSizes(engines=6), colocated=False) == [
        NodeShare(range(3), ()),
        NodeShare(range(3, 6), ()),
        NodeShare(range(6, 6), (0, 1, 2)),
        NodeShare(range(6, 6), (3, 4, 5)),
    ]
    assert shares_of_nodes(2, ranks=8, tensor=2, engines=EngineSizes(tensor=4, engines=2), colocated=True) == [
        NodeShare(range(4), (0,)),
        NodeShare(range(4, 8), (1,)),
    ]


@pytest.mark.parametrize(
    ("nodes", "ranks", "tensor", "engines", "message"),
    [
        (3, 4, 1, EngineSizes(engines=4), "8 devices are no multiple of --nodes 3"),
        (4, 6, 2, EngineSizes(engines=6), "on 4 nodes of 3 devices one has 3 training ranks, no multiple of trainer.tensor_parallel=2"),
        (2, 2, 2, EngineSizes(tensor=3, engines=2), "on 2 nodes of 4 devices engine 0 would span two"),
    ],
)
def test_what_does_not_fit_nodes_is_refused(nodes, ranks, tensor, engines, message):
    with pytest.raises(UserError, match=message):
        shares_of_nodes(nodes, ranks, tensor, engines, colocated=False)
