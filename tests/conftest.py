"""What tests of several folders share: one Ray cluster a session."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A small local cluster on the loopback interface. Its CPUs are logical: more than the machine may have."""
    from megatron_aspo.runtime.cluster import open_cluster  # slow: not for the tests that need none

    cluster = open_cluster("", 16)
    yield
    cluster.close()
