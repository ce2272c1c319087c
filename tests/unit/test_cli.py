"""The command as a user calls it: status, one line, and no file left.

One refusal runs in a new process, the others in this one.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_aspo.cli import _guarded, main
from megatron_aspo.common.errors import ProcessError
from tests.in_process import run_main
from tests.models import save_tiny
from tests.tokenizers import byte_tokenizer

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "recipes" / "quickstart.yaml"


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "megatron_aspo", *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Return a model with a number of heads that 3 does not divide, and no tokenizer: enough for all checks before the tokenizer's."""
    directory = tmp_path_factory.mktemp("model")
    save_tiny("llama", directory)
    return directory


def refused(tmp_path: Path, *arguments: object) -> str:
    before = set(tmp_path.rglob("*"))
    return refusal(tmp_path, before, run_main(main, "train", *arguments, cwd=tmp_path))


def refusal(tmp_path: Path, before: set[Path], result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 2, result.stderr
    assert set(tmp_path.rglob("*")) == before
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("megatron-aspo: error: ")
    return lines[0]


def test_an_unknown_key_is_one_line_and_status_2(tmp_path):
    result = command("train", RECIPE, "algorithm.policy_los=aspo", cwd=tmp_path)
    assert "did you mean algorithm.policy_loss?" in refusal(tmp_path, set(), result)


def test_a_missing_model_is_one_line_and_status_2(tmp_path):
    assert "no such" in refused(tmp_path, RECIPE, "model=./nowhere")


def test_a_missing_recipe_is_one_line_and_status_2(tmp_path):
    assert "there is no recipe" in refused(tmp_path, "absent.yaml")


def test_a_tensor_parallel_size_that_does_not_divide_heads_is_refused(tmp_path, model):
    assert "does not divide the model's 4 attention heads" in refused(tmp_path, RECIPE, f"model={model}", "trainer.tensor_parallel=3")
    assert "rollout.tensor_parallel=3" in refused(tmp_path, RECIPE, f"model={model}", "rollout.tensor_parallel=3")


def test_an_existing_run_directory_is_refused(tmp_path):
    (tmp_path / "taken").mkdir()
    assert "taken exists" in refused(tmp_path, RECIPE, "run_dir=taken")


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    assert "is no run's directory" in refused(tmp_path, RECIPE, "run_dir=thesis", "--resume", "auto")
    assert "resume=" in (line := refused(tmp_path, RECIPE, "--resume", "runs/gone")) and "there is no checkpoint" in line


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("import sys; sys.exit(0)", 2, "megatron-aspo: error: algorithm.policy_loss=ends:f: importing ends raised SystemExit: 0; "),
        ("def f(tokens): raise KeyboardInterrupt", 130, "megatron-aspo: interrupted"),
    ],
)
def test_a_loss_cannot_end_the_command_silently_or_with_a_traceback(tmp_path, code, status, message):
    (tmp_path / "ends.py").write_text(code)
    result = run_main(main, "check-loss", "ends:f", cwd=tmp_path)
    (line,) = result.stderr.strip().splitlines()
    assert result.returncode == status and line.startswith(message)


def test_a_process_that_failed_is_named_without_the_drivers_traceback_and_another_try_is_worth_it(tmp_path):
    def failing(parsed: argparse.Namespace):
        raise ProcessError("the process of training rank 1 died")

    result = run_main(lambda: sys.exit(_guarded(failing, argparse.Namespace())), cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.strip() == "megatron-aspo: error: the process of training rank 1 died"


def test_an_impossible_path_is_refused(tmp_path):
    assert "no usable path" in refused(tmp_path, RECIPE, "name=" + "x" * 300)
    assert "no usable path" in refused(tmp_path, RECIPE, "run_dir=~nobody_here/x")


def test_an_unreachable_cluster_is_refused_at_once_and_options_may_be_anywhere(tmp_path, tmp_path_factory):
    whole = tmp_path_factory.mktemp("whole")
    save_tiny("llama", whole)
    byte_tokenizer().save_pretrained(whole)
    assert "the Ray cluster at 127.0.0.1:1 cannot be joined" in refused(tmp_path, RECIPE, "--ray-address", "127.0.0.1:1", f"model={whole}")


def test_prompt_plus_response_must_fit_the_model(tmp_path, model):
    assert "more than the model's 1024 positions" in refused(tmp_path, RECIPE, f"model={model}", "rollout.max_response_tokens=1000")


def test_a_model_without_tokenizer_is_refused(tmp_path, model):
    assert "tokenizer" in refused(tmp_path, RECIPE, f"model={model}")


@pytest.mark.parametrize("code", ["import megatron_aspo", "from megatron_aspo.cli import main; main(['--help'])"])
def test_importing_the_package_and_printing_help_load_nothing_heavy(code):
    heavy = "{'torch', 'ray', 'vllm', 'transformers', 'numpy'} & set(sys.modules)"
    check = f"import sys, atexit; atexit.register(lambda: print('HEAVY', {heavy}))\n{code}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True, timeout=60)
    assert "HEAVY set()" in result.stdout
