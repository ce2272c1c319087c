"""A fixture that several folders share: one Ray cluster per session."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A small local cluster on the loopback interface. Its CPUs are logical: it may have more than the machine."""
    from megatron_aspo.runtime.cluster import open_cluster  # slow, so only for tests that need a cluster

    cluster = open_cluster("", 16)
    yield
    cluster.close()
