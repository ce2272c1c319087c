"""Session-wide pools, created lazily."""

import pytest

from tests.parallel.pool import Pool


@pytest.fixture(scope="session")
def pools():
    made: dict[int, Pool] = {}

    def get(world: int) -> Pool:
        if world not in made:
            made[world] = Pool(world)
        return made[world]

    yield get
    for pool in made.values():
        pool.close()
