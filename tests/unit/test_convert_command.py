"""`megatron-aspo convert` and its scripts: the shell script in a new process, the others in this one."""

import json
import os
import runpy
import subprocess
from pathlib import Path

import pytest

from megatron_aspo.cli import main
from tests.in_process import run_main
from tests.models import save_tiny
from tests.tokenizers import byte_tokenizer
from tests.unit.hf_shards import Model, assert_same, read_tensors, write_model

ROOT = Path(__file__).parents[2]


def merge(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "tools/model_merge.sh"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def script(name: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run a script of tools/, which calls the command's `main`, in this process."""
    return run_main(lambda: runpy.run_path(str(ROOT / "tools" / name), run_name="__main__"), *arguments, cwd=cwd)


def convert(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    return run_main(main, "convert", *arguments, cwd=cwd)


def test_a_model_is_converted_to_megatron_and_back_and_each_command_reports_what_it_wrote(tmp_path):
    tensors = write_model(tmp_path / "hf", Model("mixtral", layers=4), files=2)
    options = ["--tensor-parallel", 2, "--pipeline-parallel", 2, "--virtual-pipeline", 2, "--expert-parallel", 2]
    there = convert("hf", "megatron", *options, "--expert-tensor-parallel", 1, "--naming", "transformer_engine", cwd=tmp_path)
    assert there.returncode == 0, there.stderr
    assert there.stdout == f"megatron: MixtralForCausalLM, {len(tensors)} tensors, bfloat16, 4 ranks\n"
    back = convert("megatron", "back", "--max-shard-gb", 1e-6, cwd=tmp_path)
    assert back.returncode == 0, back.stderr
    first, note = back.stdout.splitlines()
    assert first == f"back: MixtralForCausalLM, {len(tensors)} tensors, bfloat16"
    # The model's tokenizer.json is a stand-in, which is copied unchanged.
    assert note.startswith("note: model=") and "its tokenizer cannot be loaded" in note
    assert_same(read_tensors(tmp_path / "back"), tensors)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 10
    assert sorted(os.listdir(tmp_path)) == ["back", "hf", "megatron"]


def test_a_tokenizer_that_autotokenizer_misreads_is_reported(tmp_path):
    tokenizer = byte_tokenizer()
    save_tiny("llama", tmp_path / "hf", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "hf")
    assert "note" not in convert("hf", "exact", "--to", "huggingface", cwd=tmp_path).stdout
    config = tmp_path / "hf" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}))
    assert "note: AutoTokenizer does not read this model's tokenizer as its files say: '" in (
        convert("hf", "target", "--to", "huggingface", cwd=tmp_path).stdout
    )


def refused(tmp_path: Path, *arguments: object) -> str:
    before = sorted(tmp_path.rglob("*"))
    result = convert(*arguments, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before
    (line,) = result.stderr.strip().splitlines()
    return line.removeprefix("megatron-aspo: error: ")


def test_faults_are_one_line_and_status_2(tmp_path):
    write_model(tmp_path / "hf", Model())
    (tmp_path / "taken").mkdir()
    file = tmp_path / "hf" / "model.safetensors"
    assert "taken exists; choose another name" in refused(tmp_path, "hf", "taken")
    assert " 3 does not divide the model's 4 attention heads" in refused(tmp_path, "hf", "target", "--tensor-parallel", 3)
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} cannot be read" in refused(tmp_path, "hf", "target")


@pytest.mark.parametrize("option", [["--tensor-parallel", "0"], ["--dtype", "int8"], ["--to", "gguf"], ["--strange"]])
def test_an_impossible_option_is_refused_with_the_usage(tmp_path, option):
    result = convert("hf", "target", *option, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("usage: megatron-aspo") and option[0] in result.stderr


def test_verify_compares_the_logits_of_both_models(tmp_path):
    save_tiny("qwen2", tmp_path / "hf", tied=True)
    result = convert("hf", "megatron", "--tensor-parallel", 2, "--verify", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "verify: " in result.stdout and "same best token for 100.0 %" in result.stdout


def test_the_scripts_convert_in_their_direction_with_paths_relative_to_the_caller(tmp_path):
    tensors = write_model(tmp_path / "a model", Model(layers=4))
    there = script("convert_hf_to_megatron.py", "a model", "m 'q'", "--pipeline-parallel", 4, cwd=tmp_path)
    assert there.returncode == 0 and "4 ranks" in there.stdout, there.stderr
    back = script("convert_megatron_to_hf.py", "m 'q'", "back", cwd=tmp_path)
    assert back.returncode == 0, back.stderr
    merged = merge("m 'q'", "$(merged) *", "--dtype", "float32", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    assert_same(read_tensors(tmp_path / "back"), tensors)
    assert_same(read_tensors(tmp_path / "$(merged) *"), {name: tensor.float() for name, tensor in tensors.items()})


def test_the_scripts_return_the_status_of_a_refusal(tmp_path):
    for name in ("convert_hf_to_megatron.py", "convert_megatron_to_hf.py"):
        assert script(name, "./nowhere", "target", cwd=tmp_path).returncode == 2
    assert merge("./nowhere", "target", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize("arguments", [[], ["checkpoint"], ["--help"], ["checkpoint", "--dtype", "float32"]])
def test_merging_without_both_directories_shows_the_usage(tmp_path, arguments):
    result = merge(*arguments, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("usage: bash tools/model_merge.sh CHECKPOINT TARGET")
