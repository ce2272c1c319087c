"""Which checkpoints are kept, how they are found, and the files that a killed process leaves."""

import json

import pytest
from hypothesis import given, strategies as st

from megatron_aspo.checkpoint.find import find_checkpoints
from megatron_aspo.checkpoint.options import CheckpointOptions
from megatron_aspo.runtime.checkpoint_store import set_aside, steps_to_remove, sweep_unfinished


def kept(accuracies: dict, **options) -> list[int]:
    removed = steps_to_remove(accuracies, CheckpointOptions(every=1, **options))
    return [step for step in sorted(accuracies) if step not in removed]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep_last": 0}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"keep_last": 1}, [8]),
        ({"keep_last": 3}, [6, 7, 8]),
        ({"keep_last": 20}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"keep_last": 1, "keep_every": 3}, [3, 6, 8]),
        ({"keep_last": 1, "keep_best": 1}, [5, 8]),
        ({"keep_last": 1, "keep_best": 2}, [2, 5, 8]),
        ({"keep_last": 2, "keep_every": 4, "keep_best": 1}, [4, 5, 7, 8]),
    ],
)
def test_the_newest_the_best_and_every_nth_are_kept(options, expected):
    accuracies = {1: 0.1, 2: 0.7, 3: None, 4: 0.2, 5: 0.9, 6: 0.3, 7: None, 8: 0.1}
    assert kept(accuracies, **options) == expected


def test_the_newer_of_two_equal_accuracies_is_kept():
    assert kept({1: 0.5, 2: 0.5, 3: 0.1}, keep_last=1, keep_best=1) == [2, 3]


@given(
    st.dictionaries(st.integers(1, 50), st.none() | st.floats(0, 1), min_size=1), st.integers(1, 5), st.integers(0, 5), st.integers(0, 5)
)
def test_the_newest_is_always_kept(accuracies, last, every, best):
    assert max(accuracies) in kept(accuracies, keep_last=last, keep_every=every, keep_best=best)


@pytest.fixture
def run(tmp_path):
    for name in ("step_2", "step_10", "step_9", "step_3.superseded", "step_11.unfinished-host-1", "step_x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").write_text(json.dumps({"of": name}))
    (tmp_path / "checkpoints" / "step_12").mkdir()
    return tmp_path


def names(run) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def test_checkpoints_are_found_oldest_first_and_nothing_else_is(run):
    assert list(find_checkpoints(run)) == [2, 9, 10, 12]
    assert find_checkpoints(run / "nowhere") == {}


def test_only_the_files_of_a_killed_process_are_swept(run):
    before = names(run)
    (run / "checkpoints" / "step_4.unfinished-host-2-removed").mkdir()
    sweep_unfinished(run)
    assert names(run) == before - {"step_11.unfinished-host-1"}
    sweep_unfinished(run / "nowhere")


def test_later_checkpoints_and_exports_are_set_aside_and_kept(run):
    (run / "exports" / "step_9").mkdir(parents=True)
    (run / "exports" / "step_2").mkdir()
    (run / "checkpoints" / "step_9.superseded").mkdir()
    aside = set_aside(run, 2)
    # One was set aside before, and is kept too.
    expected = ["step_10.superseded", "step_12.superseded", "step_9.superseded", "step_9.superseded-2"]
    assert sorted(path.name for path in aside) == expected
    assert list(find_checkpoints(run)) == [2]
    assert json.loads((run / "checkpoints" / "step_9.superseded-2" / "manifest.json").read_text()) == {"of": "step_9"}
    assert {path.name for path in (run / "exports").iterdir()} == {"step_2", "step_9.superseded"}


def test_rollouts_and_evaluations_of_repeated_steps_are_set_aside(tmp_path):
    """A checkpoint after step 2 is kept with the evaluation after it and the rollouts that made it: those of steps 0 and 1."""
    for room, suffix in (("rollouts", ".parquet"), ("evaluations", ".json")):
        (tmp_path / room).mkdir()
        for step in range(4):
            (tmp_path / room / f"step_{step}{suffix}").touch()
        (tmp_path / room / "notes.txt").touch()
    assert set_aside(tmp_path, 2) == []
    aside = {room: sorted(path.name for path in (tmp_path / room).iterdir()) for room in ("rollouts", "evaluations")}
    assert aside == {
        "rollouts": ["notes.txt", "step_0.parquet", "step_1.parquet", "step_2.parquet.superseded", "step_3.parquet.superseded"],
        "evaluations": ["notes.txt", "step_0.json", "step_1.json", "step_2.json", "step_3.json.superseded"],
    }
