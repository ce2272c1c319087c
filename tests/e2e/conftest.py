"""A user's directory with a run that most tests read; hosts for tests over several nodes."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.workplace import WHOLE, make_workplace, train
from tests.hosts import Hosts, why_not


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("train")
    make_workplace(directory)
    return directory


@pytest.fixture(scope="session")
def whole(workplace) -> Path:
    """Return the directory of an undisturbed deterministic run, with a checkpoint after each step."""
    status, _, error = train(workplace, "name=whole", *WHOLE)
    assert status == 0, error
    return workplace / "runs" / "whole"


@pytest.fixture(scope="module")
def hosts(request) -> Iterator[Hosts]:
    """Two hosts, or the number in the module's HOSTS.

    Where the system forbids them, the tests are skipped; any other failure is an error.
    """
    if reason := why_not():
        pytest.skip(reason)
    directory = Path(tempfile.mkdtemp(prefix="aspo-hosts-", dir="/var/tmp"))
    directory.chmod(0o755)
    try:
        with Hosts(directory, getattr(request.module, "HOSTS", 2)) as made:
            yield made
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def clean_hosts(hosts) -> Iterator[None]:
    """Let the test begin on hosts without any process and without any file in /tmp."""
    for host in (1, 2):
        assert not hosts.processes(host)
    yield
    for host in (1, 2):
        if hosts.is_up(host):
            hosts.kill(host)
        hosts.boot(host)
