"""The target of an evaluation: directories, checkpoints, runs and servers, and the digest that identifies the model."""

import json
from pathlib import Path

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.evaluation.target import check_positions, engine_dtype, find_target, model_sha256, vocabulary
from tests.models import save_tiny
from tests.unit.test_watch import make_hugging_face


def make_run(directory: Path, checkpoints=(), exports=()) -> Path:
    for step in checkpoints:
        (directory / "checkpoints" / f"step_{step}" / "huggingface").mkdir(parents=True)
    for step in exports:
        make_hugging_face(directory / "exports" / f"step_{step}")
    directory.mkdir(exist_ok=True)
    (directory / "config.yaml").write_text("name: run\n")
    return directory


def test_a_run_means_its_final_model_or_else_its_newest_checkpoint(tmp_path):
    run = make_run(tmp_path / "a", checkpoints=(2, 10))
    found = find_target(str(run))
    assert (found.checkpoint, found.directory, found.run, found.step) == (run / "checkpoints" / "step_10", None, run, 10)
    run = make_run(tmp_path / "b", checkpoints=(2, 10), exports=(10,))
    found = find_target(str(run))
    assert (found.checkpoint, found.directory, found.run, found.step) == (None, run / "exports" / "step_10", run, 10)
    with pytest.raises(UserError, match="has neither a checkpoint nor an exported model"):
        find_target(str(make_run(tmp_path / "c")))


def test_parts_of_a_run_know_it_and_other_directories_have_none(tmp_path):
    run = make_run(tmp_path / "run", checkpoints=(2,), exports=(4,))
    assert find_target(str(run / "checkpoints" / "step_2")).run == find_target(str(run / "exports" / "step_4")).run == run
    make_hugging_face(tmp_path / "elsewhere" / "step_3")
    found = find_target(str(tmp_path / "elsewhere" / "step_3"))
    assert found.run is None and found.step == 3 and found.name == str(tmp_path / "elsewhere" / "step_3")


def test_a_url_is_a_server_and_any_other_target_must_exist(tmp_path):
    assert find_target("http://127.0.0.1:8000/v1/").endpoint == "http://127.0.0.1:8000/v1"
    with pytest.raises(UserError, match="there is no such directory"):
        find_target(str(tmp_path / "none"))


def test_the_digest_changes_with_weights_config_and_generation_config_alone(tmp_path):
    save_tiny("llama", tmp_path)
    digests = [model_sha256(tmp_path)]
    (tmp_path / "README.md").write_text("words")
    assert model_sha256(tmp_path) == digests[0]
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        with (tmp_path / name).open("ab") as file:
            file.write(b" ")
        digests.append(model_sha256(tmp_path))
    assert len(set(digests)) == 4
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no safetensors files"):
        model_sha256(tmp_path)


def test_lengths_vocabulary_and_element_type_come_from_the_config(tmp_path):
    config = {"max_position_embeddings": 100, "vocab_size": 7, "dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_positions(tmp_path, 100)
    with pytest.raises(UserError, match=r"data\.max_prompt_tokens \+ max_response_tokens = 101 is more than the 100 positions"):
        check_positions(tmp_path, 101)
    assert vocabulary(tmp_path) == 7 and engine_dtype(tmp_path) == "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    assert engine_dtype(tmp_path) == "float32"
