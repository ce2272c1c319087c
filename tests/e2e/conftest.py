"""One user's directory for each test module."""

from pathlib import Path

import pytest

from tests.e2e.workplace import make_workplace


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("train")
    make_workplace(place)
    return place
