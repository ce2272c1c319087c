"""One user's directory, and a run in it that most tests look at."""

from pathlib import Path

import pytest

from tests.e2e.workplace import WHOLE, make_workplace, train


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("train")
    make_workplace(place)
    return place


@pytest.fixture(scope="session")
def whole(workplace) -> Path:
    """Directory of a deterministic run that nobody touched, with a checkpoint after each step."""
    status, _, error = train(workplace, "name=whole", *WHOLE)
    assert status == 0, error
    return workplace / "runs" / "whole"
