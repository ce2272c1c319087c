"""When transfers are verified, and what the driver hands both ends. The ends themselves: test_exchange.py, and every training run."""

from types import SimpleNamespace

import pytest

from megatron_aspo.weights.publish import Publisher


@pytest.mark.parametrize(("every", "verified"), [(0, [1]), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 4, 7])])
def test_the_first_transfer_and_every_so_many_are_verified_at_both_ends(every, verified):
    asked = {"trainers": [], "engines": []}
    done = SimpleNamespace(result=lambda timeout_s: None)

    def receive(buckets: int, version: int, verify: bool):
        assert buckets == 5
        asked["engines"].append((version, verify))
        return done

    def publish(version: int, verify: bool) -> int:
        asked["trainers"].append((version, verify))
        return 100

    trainers = SimpleNamespace(address=lambda: ("127.0.0.1", 1), connect=lambda *_: 5, publish=publish)
    engines = SimpleNamespace(connect=lambda *_: done, receive_weights=receive, versions=lambda: [asked["engines"][-1][0]])
    publisher = Publisher(trainers, engines, None, 10.0, every)
    assert [publisher.publish(version) for version in range(1, 8)] == [100] * 7
    assert publisher.version == 7
    assert asked["trainers"] == asked["engines"] == [(version, version in verified) for version in range(1, 8)]
