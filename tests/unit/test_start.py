"""Start of a run: every state of the run directory that a user can leave."""

import json
import multiprocessing
from dataclasses import replace

import pytest

from megatron_aspo.checkpoint.manifest import Manifest, write_manifest
from megatron_aspo.common.errors import UserError
from megatron_aspo.config import Config
from megatron_aspo.observe.metrics import MetricsFile
from megatron_aspo.runtime.ledger import Ledger
from megatron_aspo.runtime.start import Ownership, find_start
from megatron_aspo.weights.layout import ParallelSizes


@pytest.fixture
def config(tmp_path):
    return Config(name="run", run_dir=str(tmp_path / "run"))


def make_checkpoint(run, step: int, training: bool = True):
    directory = run / "checkpoints" / f"step_{step}"
    (directory / "model").mkdir(parents=True)
    (directory / "huggingface").mkdir()
    (directory / "model" / "rank_00000.safetensors").write_bytes(bytes(range(200)))
    write_manifest(directory, Manifest("LlamaForCausalLM", "float32", "local", ParallelSizes(), {}, {"step": step} if training else {}), {})
    return directory


def make_run(config, *steps: int):
    config.directory.mkdir()
    Ownership(config.directory).close()
    return [make_checkpoint(config.directory, step) for step in steps]


def test_a_new_run_starts_at_step_0(config):
    for resume in ("never", "auto"):
        start = find_start(replace(config, resume=resume))
        assert not start.in_place and start.step == 0 and start.checkpoint is None


def test_without_resume_an_existing_run_is_not_touched(config):
    make_run(config, 3)
    with pytest.raises(UserError, match=r"run exists; .*resume=auto"):
        find_start(config)


def test_auto_resumes_from_the_newest_checkpoint(config):
    make_run(config, 9, 10, 2)
    start = find_start(replace(config, resume="auto"))
    assert start.in_place and start.step == 10 and start.checkpoint.name == "step_10"


def test_auto_starts_over_in_a_run_that_was_killed_before_its_first_checkpoint(config):
    make_run(config)
    (config.directory / "checkpoints" / "step_1.unfinished-x").mkdir(parents=True)
    start = find_start(replace(config, resume="auto"))
    assert start.in_place and start.step == 0


def test_auto_resumes_from_the_start_of_a_branch_until_it_has_its_own_checkpoint(config, tmp_path):
    """Also after a restart that found no checkpoint: each process records where it began."""
    trunk = replace(config, run_dir=str(tmp_path / "trunk"))
    (began,) = make_run(trunk, 7)
    make_run(config)
    ledger = Ledger(config.directory / "ledger.jsonl")
    for event in ("start", "resume"):
        ledger.append(event, step=7, checkpoint=str(began))
    ledger.close()
    start = find_start(replace(config, resume="auto"))
    assert start.in_place and start.checkpoint == began and start.step == 7
    make_checkpoint(config.directory, 8)
    assert find_start(replace(config, resume="auto")).step == 8


def test_auto_does_not_start_over_where_checkpoints_are_lost(config):
    make_run(config)
    ledger = Ledger(config.directory / "ledger.jsonl")
    ledger.append("start", step=0, checkpoint="")
    ledger.append("checkpoint", name="step_1")
    ledger.close()
    with pytest.raises(UserError, match="the ledger names checkpoints, but there is none"):
        find_start(replace(config, resume="auto"))


@pytest.mark.parametrize("left", [[], ["lock"], ["lock", ".attempt.unfinished"]], ids=str)
def test_auto_starts_in_a_directory_whose_first_process_was_killed_at_once(config, left):
    config.directory.mkdir()
    for name in left:
        (config.directory / name).touch()
    start = find_start(replace(config, resume="auto"))
    assert start.in_place and start.checkpoint is None


def test_a_checkpoint_that_was_set_aside_is_not_resumed_in_its_own_run(config, tmp_path):
    (checkpoint,) = make_run(config, 3)
    aside = checkpoint.rename(checkpoint.with_name("step_3.superseded"))
    with pytest.raises(UserError, match=r"step_3\.superseded was set aside from its run; go on from it under another name"):
        find_start(replace(config, resume=str(aside)))
    elsewhere = replace(config, run_dir=str(tmp_path / "branch"), resume=str(aside))
    assert not find_start(elsewhere).in_place and find_start(elsewhere).step == 3


def test_auto_does_not_write_into_a_directory_that_is_no_run(config):
    config.directory.mkdir()
    (config.directory / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is no run's directory"):
        find_start(replace(config, resume="auto"))


@pytest.mark.parametrize("file", ["model/rank_00000.safetensors", "manifest.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed"])
def test_a_damaged_checkpoint_is_refused_by_file_and_the_one_before_it_offered(config, file, damage):
    *_, older, newest = make_run(config, 2, 4, 6)
    data = (newest / file).read_bytes()
    if damage == "removed":
        (newest / file).unlink()
    else:
        (newest / file).write_bytes(data[:-1] if damage == "truncated" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(UserError, match=rf"{file}.*--resume .*{older.name}"):
        find_start(replace(config, resume="auto"))
    assert find_start(replace(config, resume=str(older))).step == 4


def test_a_damaged_only_checkpoint_has_none_before_it(config):
    (only,) = make_run(config, 2)
    (only / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.json is damaged.*there is none before it"):
        find_start(replace(config, resume="auto"))


def test_a_path_may_be_a_checkpoint_or_a_run_of_this_name_or_of_another(config, tmp_path):
    _, last = make_run(config, 2, 4)
    for path in (last, config.directory):
        start = find_start(replace(config, resume=str(path)))
        assert start.in_place and start.step == 4
        branch = find_start(replace(config, run_dir=str(tmp_path / "branch"), resume=str(path)))
        assert not branch.in_place and branch.step == 4
    (tmp_path / "branch").mkdir()
    with pytest.raises(UserError, match="is another run's"):
        find_start(replace(config, run_dir=str(tmp_path / "branch"), resume=str(last)))
    with pytest.raises(UserError, match="there is no checkpoint"):
        find_start(replace(config, resume=str(tmp_path / "nowhere")))


def test_a_run_does_not_resume_from_weights_alone(config):
    make_run(config)
    with pytest.raises(UserError, match="weights alone"):
        find_start(replace(config, resume=str(make_checkpoint(config.directory, 1, training=False))))


def _own(directory, pipe):
    try:
        owner = Ownership(directory)
        pipe.send(owner.attempt)
        pipe.recv()
    except UserError as error:
        pipe.send(str(error))


def test_two_live_processes_never_own_one_run(tmp_path):
    """The lock ends with the process, however it ends."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    answers = []
    for _ in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=_own, args=(tmp_path, theirs), daemon=True)
        process.start()
        answers.append(ours.recv())
        pipes.append(ours)
        processes.append(process)
    assert answers[0] in answers[1] and "is in use by" in answers[1]
    processes[0].kill()
    for process in processes:
        process.join()
    assert Ownership(tmp_path).attempt == (tmp_path / "attempt").read_text()


def test_metrics_of_repeated_steps_are_set_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "old": True}) + "\n" for step in range(4)]
    path.write_text("".join(lines) + '{"step": 4, "o')
    file = MetricsFile(path, first_step=2)
    file.write({"step": 2, "old": False})
    file.close()
    assert path.read_text() == "".join(lines[:2]) + '{"step": 2, "old": false}\n'
    assert (tmp_path / "metrics.superseded.jsonl").read_text() == "".join(lines[2:])
