import pytest

from megatron_aspo.rollout.share import share


def test_a_group_stays_on_one_engine_and_groups_are_dealt_in_turn():
    assert share(n_requests=10, n_engines=2, group_size=2) == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0]


def test_no_engine_gets_more_than_one_group_above_another():
    for engines in range(1, 6):
        for groups in range(0, 12):
            counts = [share(groups * 3, engines, 3).count(engine) for engine in range(engines)]
            assert sum(counts) == groups * 3
            assert max(counts) - min(counts) <= 3


def test_the_start_of_a_longer_batch_is_shared_like_the_shorter_batch():
    assert share(24, 3, 4)[:12] == share(12, 3, 4)


@pytest.mark.parametrize(("requests", "engines", "group"), [(5, 2, 2), (4, 0, 2), (4, 2, 0), (-2, 2, 2)])
def test_impossible_shares_are_refused(requests, engines, group):
    with pytest.raises(ValueError, match=str(requests)):
        share(requests, engines, group)
