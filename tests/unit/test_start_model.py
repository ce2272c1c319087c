"""Runs and evaluations accept a torch_dist checkpoint wherever they accept a Hugging Face directory."""

import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from megatron_aspo.checkpoint.convert import convert, open_source
from megatron_aspo.checkpoint.start_model import hugging_face_copy
from megatron_aspo.cli import main
from megatron_aspo.common.errors import UserError
from megatron_aspo.config import load_config
from megatron_aspo.doctor.files import check_model
from megatron_aspo.doctor.recipe import check_placement
from megatron_aspo.evaluation.target import find_target, hugging_face
from megatron_aspo.runtime import processes, run
from megatron_aspo.runtime.checks import check_run
from megatron_aspo.runtime.plan import make_plan
from tests.in_process import run_main
from tests.models import save_tiny
from tests.tokenizers import byte_tokenizer
from tests.unit.test_plan_command import RECIPE

COPY = Path("dist/release/hugging_face_model")


class ReachedRay(Exception):
    """Raised when all checks of a run have passed."""


@pytest.fixture
def dist(tmp_path, monkeypatch) -> Path:
    """Return a checkpoint of a model with its tokenizer, beside a recipe that names it. A run ends where it would start Ray."""

    def started(*_):
        raise ReachedRay

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "open_cluster", started)
    tokenizer = byte_tokenizer()
    save_tiny("qwen2", tmp_path / "hf", tied=True, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "hf")
    convert(open_source("./hf"), tmp_path / "dist", to="torch_dist")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"model": "dist", "data": {"max_prompt_tokens": 64}}))
    return tmp_path / "dist"


def config(**changes):
    return load_config(Path("recipe.yaml"), [f"{key}={value}" for key, value in changes.items()])


def train(**changes) -> None:
    with pytest.raises(ReachedRay), run.open_run(config(**changes)):
        pass


def assert_is_the_model(directory: Path) -> None:
    original = {path.name: path.read_bytes() for path in Path("hf").iterdir() if path.suffix != ".safetensors"}
    assert original == {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".safetensors"}
    found, expected = (load_file(top / "model.safetensors") for top in (directory, Path("hf")))
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("named", ["dist", "dist/release"])
def test_a_run_converts_it_once_and_ranks_and_engines_get_the_whole_model(dist, named):
    train(model=named)
    assert_is_the_model(COPY / "model")
    written = (COPY / "model" / "model.safetensors").stat().st_mtime_ns
    train(model=named)
    assert (COPY / "model" / "model.safetensors").stat().st_mtime_ns == written
    checked = check_run(config(model=named), "cpu").in_hugging_face_format()
    assert checked.model.directory == checked.settings.model_directory == (dist / "release" / "hugging_face_model" / "model")


def test_a_plan_and_the_doctor_read_it_without_a_conversion(dist):
    plan = make_plan(config(), "cpu")
    assert plan.notes == (f"train will first write a Hugging Face copy of {dist / 'release'} into it, for engines and ranks",)
    assert plan.ranks == make_plan(config(model="hf"), "cpu").ranks
    assert check_placement(config(), "cpu", []).status == check_model(str(dist)).status == "ok"
    assert not COPY.exists()
    train()
    assert make_plan(config(), "cpu").notes == ()


def test_prompts_are_shown_as_its_tokenizer_reads_them(dist):
    Path("prompts.jsonl").write_text('{"prompt": "hello", "ground_truth": "1", "data_source": "math"}\n')
    reports = [run_main(main, "data", "prompts.jsonl", "--model", model, "--json", cwd=dist.parent) for model in ("dist", "hf")]
    assert reports[0].returncode == 0 and reports[0].stdout == reports[1].stdout


def test_an_evaluation_gets_it_in_hugging_face_format(dist, tmp_path):
    with hugging_face(find_target("dist"), tmp_path / "beside") as directory:
        assert_is_the_model(directory)
    assert not (tmp_path / "beside").exists()


def test_a_checkpoint_that_changed_since_is_refused_with_the_cure(dist):
    train()
    os.utime(dist / "release" / "__0_0.distcp", ns=(1, 1))
    message = r"dist/release/hugging_face_model was made from other files than .*dist/release has now: remove it, and it is made again"
    for command in (lambda: make_plan(config(), "cpu"), lambda: run.open_run(config()).__enter__()):
        with pytest.raises(UserError, match=message):
            command()
    shutil.rmtree(COPY)
    train()


def test_a_checkpoint_of_megatron_is_refused_with_the_command_that_adds_a_config_and_a_tokenizer(dist):
    shutil.rmtree(dist / "release" / "huggingface")
    error = (
        "model=dist: the checkpoint has no Hugging Face config and tokenizer, .* `megatron-aspo convert dist TARGET --config-from MODEL`"
    )
    commands = (lambda: make_plan(config(), "cpu"), lambda: run.open_run(config()).__enter__(), lambda: find_target("dist"))
    for command in commands:
        with pytest.raises(UserError, match=error):
            command()
    convert(open_source("dist", config_from="./hf"), Path("target").absolute(), to="huggingface")
    train(model="target")


def test_damage_ends_the_run_before_it_starts_and_leaves_no_copy(dist):
    shard = dist / "release" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"engines need .*dist/release in Hugging Face format, but .* is not the tensor that .* TARGET"):
        run.open_run(config()).__enter__()
    assert not COPY.exists()


def test_runs_that_convert_at_once_all_use_one_copy(dist):
    context = multiprocessing.get_context("fork")  # so that children have the modules already
    barrier, results = context.Barrier(3), context.SimpleQueue()

    def convert_too() -> None:
        barrier.wait()
        results.put(hugging_face_copy(dist / "release"))

    children = [context.Process(target=convert_too) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert {results.get() for _ in children} == {dist / "release" / "hugging_face_model" / "model"}
    assert_is_the_model(COPY / "model")
