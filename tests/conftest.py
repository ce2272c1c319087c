"""What tests of several folders share: one Ray cluster a session."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A small local cluster on the loopback interface. Its CPUs are logical: more than the machine may have."""
    import ray  # slow: not for the tests that need none

    ray.init(
        address="local",
        num_cpus=16,
        include_dashboard=False,
        object_store_memory=200 << 20,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()
