"""A run whose engines and training ranks time-share their devices."""

import pyarrow.parquet as parquet
import pytest

from tests.e2e.test_resume import tensor_files
from tests.e2e.workplace import WHOLE, timeless, train

pytestmark = pytest.mark.long
STEPS = 2
"""Enough to return to training once from trained weights."""


def test_a_colocated_run_gives_the_results_of_one_on_separate_devices(workplace, whole):
    status, _, error = train(workplace, "name=colocated", "placement=colocated", *WHOLE, f"steps={STEPS}")
    assert status == 0, error
    run = workplace / "runs" / "colocated"
    assert timeless(run) == timeless(whole)[:STEPS]
    assert len(timeless(run)) == STEPS
    for step in range(STEPS):
        ours, theirs = (parquet.read_table(r / "rollouts" / f"step_{step}.parquet") for r in (run, whole))
        assert ours.equals(theirs)
    assert tensor_files(run, STEPS) == tensor_files(whole, STEPS)
    assert tensor_files(run, STEPS)
