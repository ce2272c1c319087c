"""One list of checks: a mistake in a model or recipe is refused in the same words by every command, before anything is started."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_aspo import cli
from megatron_aspo.checkpoint.convert import open_source
from megatron_aspo.commands import verify_sync as verify_sync_command
from megatron_aspo.common.errors import UserError
from megatron_aspo.config import load_config
from megatron_aspo.hf.model import read_model
from megatron_aspo.hf.tensor_files import TensorReader
from megatron_aspo.runtime import processes, run
from megatron_aspo.runtime.plan import make_plan
from megatron_aspo.runtime.start import Ownership
from tests.in_process import run_main
from tests.models import save_tiny
from tests.unit.test_plan_command import RECIPE

HEAD, EMBEDDING, Q = "lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
FILES = "model/model.safetensors"


@pytest.fixture
def directory(tmp_path, monkeypatch) -> Path:
    """Return the directory of a recipe and a tied model, in which no Ray can be started."""

    def started(*_):
        raise AssertionError("Ray was about to be started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "open_cluster", started)
    save_tiny("qwen2", tmp_path / "model", tied=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def config(*overrides: str):
    return load_config(Path("recipe.yaml"), overrides)


def train(*overrides: str) -> None:
    with run.open_run(config(*overrides)):
        pass


def resume(*overrides: str) -> None:
    (chosen := config(*overrides, "resume=auto")).directory.mkdir(parents=True, exist_ok=True)
    Ownership(chosen.directory).close()
    train(*overrides, "resume=auto")


def plan(*overrides: str) -> None:
    make_plan(config(*overrides), "cpu")


def convert(*_: str) -> None:
    open_source("model")


def verify_sync(*overrides: str) -> None:
    """Call the command as a user does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_sync_command, "open_cluster", processes.open_cluster)
        done = run_main(cli.main, "verify-sync", "recipe.yaml", *overrides, cwd=Path.cwd())
    assert done.returncode == 2
    raise UserError(done.stderr.removeprefix("megatron-aspo: error: ").strip())


def refusals(commands: list[Callable], *overrides: str) -> set[str]:
    """Return the commands' refusals; one line when they agree."""
    lines = set()
    for command in commands:
        with pytest.raises(UserError) as refused:
            command(*overrides)
        lines.add(str(refused.value))
    return lines


def change_tensors(change: Callable[[dict], object]) -> None:
    tensors = load_file(FILES)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, FILES)


def change_config(**changes) -> None:
    file = Path("model/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def another_index() -> None:
    names = load_file(FILES)
    index = {"weight_map": dict.fromkeys(names, "model.safetensors") | {Q: "gone.safetensors"}}
    Path("model/model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda: change_tensors(lambda t: t.update({HEAD: t[EMBEDDING] + 1})), "config.json ties them; set tie_word_embeddings to false"),
        (lambda: change_tensors(lambda t: t.update({HEAD: t[EMBEDDING][:-1]})), "lm_head.weight differs from model.embed_tokens.weight"),
        (lambda: change_tensors(lambda t: t.update({HEAD: t[EMBEDDING].to(torch.float8_e4m3fn)})), "lm_head.weight differs from"),
        (lambda: change_tensors(lambda t: t.update({HEAD: t.pop(EMBEDDING)})), f"lacks {EMBEDDING}"),
        (lambda: change_config(tie_word_embeddings=False), f"lacks {HEAD}"),
        (lambda: change_tensors(lambda t: t.update({Q: t[Q].to(torch.int8)})), "element type I8"),
        (lambda: change_tensors(lambda t: t.update({"extra": t[Q]})), "unknown tensor extra in model.safetensors"),
        (lambda: change_config(quantization_config={"quant_method": "fp8"}), "quantization_config"),
        (lambda: Path(FILES).rename("model/pytorch_model.bin"), "no .safetensors file; convert the model"),
        (lambda: Path("model/adapter_model.safetensors").touch(), "adapter_model.safetensors belongs to a LoRA adapter"),
        (another_index, "gone.safetensors is named by model.safetensors.index.json but missing"),
    ],
    ids=[
        "tied, another head",
        "tied, a head of another shape",
        "tied, a quantized head",
        "tied, only the head",
        "untied, no head",
        "quantized files",
        "unknown tensor",
        "quantized config",
        "only .bin",
        "adapter",
        "index",
    ],
)
def test_a_mistake_in_a_model_is_reported_in_one_line_by_every_command(directory, spoil, message):
    spoil()
    (line,) = refusals([convert, plan, train, resume, verify_sync])
    assert message in line and "\n" not in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.tensor_parallel=3"], "does not divide"),
        (["rollout.tensor_parallel=3"], "does not divide"),
        (["rollout.max_response_tokens=100000"], "positions; lower one of them"),
        (["rollout.kv_cache_gib=0.00001"], "raise it to"),
        (["rollout.engines=2", "placement=colocated"], "placement=split"),
        (["trainer.fp8=hybrid", "trainer.dtype=bfloat16"], "needs a GPU"),
        (["trainer.layer_spec=transformer_engine"], "needs a CUDA device"),
        (["algorithm.policy_loss=nowhere:f"], "nowhere"),
    ],
    ids=str,
)
def test_a_mistake_in_a_recipe_is_reported_in_one_line_by_every_command(directory, overrides, message):
    (line,) = refusals([plan, train, resume, verify_sync], *overrides)
    assert message in line


def test_a_head_size_that_engines_lack_is_refused_before_they_start(directory):
    save_tiny("qwen2", directory / "model", tied=True, hidden_size=64)
    (line,) = refusals([plan, train, resume, verify_sync])
    assert "attention heads have 16 channels" in line
    convert()  # Megatron has no such limit


def test_more_memory_than_the_machine_has_is_refused_by_train_and_plan(directory):
    (line,) = refusals([plan, train, resume], "rollout.kv_cache_gib=100000")
    assert "GB on this machine" in line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tied_model_with_an_equal_copy_of_its_head_is_accepted(directory, dtype):
    """The copy may have any element type, as long as its values are the same."""
    change_tensors(lambda t: t.update({EMBEDDING: t[EMBEDDING].bfloat16().float()}))
    change_tensors(lambda t: t.update({HEAD: t[EMBEDDING].to(dtype)}))
    assert HEAD not in TensorReader.checked(read_model(directory / "model")).dtypes
    plan()
