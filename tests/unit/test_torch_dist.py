"""Hugging Face → torch_dist → Hugging Face is the same model, bit for bit; damaged, hostile or foreign files are refused."""

import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_aspo.checkpoint.convert import convert, open_source
from megatron_aspo.checkpoint.torch_dist_table import read_table
from megatron_aspo.checkpoint.verify import verify
from megatron_aspo.cli import main
from megatron_aspo.common.errors import UserError
from megatron_aspo.hf.model_directory import LATEST
from megatron_aspo.weights.families import NAMINGS
from megatron_aspo.weights.layout import ParallelSizes
from tests.in_process import run_main
from tests.models import rope_scaling, save_tiny
from tests.unit.hf_shards import ARCHITECTURES, Model, assert_same, read_tensors, write_model
from tests.unit.test_convert import MEMORY
from tests.unit.test_hf_model import change_config
from tests.unit.test_listings import LISTINGS

LAYOUTS = (
    ParallelSizes(),
    ParallelSizes(tensor=2),
    ParallelSizes(pipeline=2),
    ParallelSizes(tensor=2, pipeline=2),
    ParallelSizes(pipeline=2, virtual=2),
    ParallelSizes(tensor=2, data=2),
)


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory where fsync costs nothing."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        yield Path(name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_the_round_trip_is_bit_exact_from_every_layout(in_memory, family, tied):
    tensors = write_model(in_memory / "hf", Model(family, layers=4, tied=tied), torch.bfloat16, files=2)
    for number, sizes in enumerate(LAYOUTS):
        convert(open_source(in_memory / "hf"), in_memory / f"{number}", to="megatron", sizes=sizes)
        convert(open_source(in_memory / f"{number}"), in_memory / f"{number}_dist", to="torch_dist", naming=NAMINGS[number % 2])
        convert(open_source(in_memory / f"{number}_dist"), in_memory / f"{number}_hf", to="huggingface")
        assert_same(read_tensors(in_memory / f"{number}_hf"), tensors)
    for file in (in_memory / "hf").glob("[!m]*"):
        assert (in_memory / "0_hf" / file.name).read_bytes() == file.read_bytes()


def test_keys_match_both_layer_specs(tmp_path):
    """The names of the norm before experts in Megatron-Core's sharded state dicts, for the local and for Transformer Engine's specs."""
    write_model(tmp_path / "hf", Model("mixtral"))
    keys = {}
    for naming in NAMINGS:
        convert(open_source(tmp_path / "hf"), tmp_path / naming, to="torch_dist", naming=naming)
        keys[naming] = read_table(tmp_path / naming / "release")
    assert keys["local"]["decoder.layers.mlp.experts.experts.linear_fc1.weight"].shape == (2, 4, 16, 12)
    assert keys["local"].keys() - keys["transformer_engine"].keys() == {"decoder.layers.mlp.linear_fc1.layer_norm_weight"}
    assert keys["transformer_engine"].keys() - keys["local"].keys() == {"decoder.layers.pre_mlp_layernorm.weight"}


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_keys_are_the_parameters_of_transformer_engines_layers(tmp_path, family):
    """Without the numbers of layers and experts, which are axes; experts have a second name, as in Megatron-Core's state dicts."""
    write_model(tmp_path / "hf", Model(family, tied=family == "qwen2"))
    convert(open_source(tmp_path / "hf"), tmp_path / "dist", to="torch_dist", naming="transformer_engine")
    listing = LISTINGS / "0.16.1" / "transformer_engine" / f"{ARCHITECTURES[family]}.json"
    parameters = json.loads(listing.read_text())["ranks"][0]["parameters"]
    names = {
        re.sub(r"layers\.\d+", "layers", re.sub(r"experts\.(linear_fc.\.weight)\d+", r"experts.experts.\1", name)) for name in parameters
    }
    assert read_table(tmp_path / "dist" / "release").keys() == names


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    write_model(tmp_path / "hf", Model())
    convert(open_source(tmp_path / "hf"), tmp_path / "dist", to="torch_dist")
    return tmp_path / "dist"


def refused(checkpoint: Path, target: Path, **options) -> str:
    """Return the one line with which a conversion back ends; no target is left."""
    with pytest.raises(UserError) as ended:
        convert(open_source(checkpoint, **options), target, to="huggingface")
    assert not target.exists() and "\n" not in str(ended.value)
    return str(ended.value)


def test_a_changed_weight_is_noticed(checkpoint, tmp_path):
    """A change of the last byte of a shard's zip member would load: torch does not check its checksum."""
    (shard,) = read_table(checkpoint / "release")["embedding.word_embeddings.weight"].shards
    content = bytearray(shard.file.read_bytes())
    raw = shard.read().view(torch.uint8).numpy().tobytes()
    content[content.index(raw, shard.offset) + 5] ^= 1
    shard.file.write_bytes(content)
    assert "model.embed_tokens.weight is not the tensor that" in refused(checkpoint, tmp_path / "back")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_truncated_file_is_named(checkpoint, tmp_path, name):
    file = checkpoint / "release" / name
    file.write_bytes(file.read_bytes()[:-2000])
    assert f"{name} cannot be read" in refused(checkpoint, tmp_path / "back")


class Hostile:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_code_in_the_table_is_not_run(checkpoint, tmp_path):
    (checkpoint / "release" / ".metadata").write_bytes(pickle.dumps(Hostile(f"touch {tmp_path}/ran")))
    assert "it refers to posix.system, which is no part of a table of tensors" in refused(checkpoint, tmp_path / "back")
    assert not (tmp_path / "ran").exists()


def test_a_table_that_points_elsewhere_is_refused(checkpoint, tmp_path):
    table = checkpoint / "release" / ".metadata"
    table.write_bytes(table.read_bytes().replace(b"__0_0.distcp", b"../../secret"))
    assert "../../secret lies outside the directory" in refused(checkpoint, tmp_path / "back")


def test_another_models_config_is_refused_by_the_tensor(checkpoint, tmp_path):
    write_model(tmp_path / "wider", Model(ffn=10))
    assert "decoder.layers.mlp.linear_fc1.weight has shape (2, 16, 12)" in refused(
        checkpoint, tmp_path / "a", config_from=tmp_path / "wider"
    )
    write_model(tmp_path / "other", Model("qwen3"))
    assert "q_layernorm" in refused(checkpoint, tmp_path / "b", config_from=tmp_path / "other")
    write_model(tmp_path / "llama", Model("llama"))
    assert "linear_qkv.bias, which a LlamaForCausalLM" in refused(checkpoint, tmp_path / "c", config_from=tmp_path / "llama")


def test_a_missing_iteration_and_other_formats_are_refused(checkpoint, tmp_path):
    (checkpoint / LATEST).write_text("7")
    assert "says '7', but" in refused(checkpoint, tmp_path / "back")
    (checkpoint / "release" / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    assert "has the format zarr; only torch_dist can be read" in refused(checkpoint / "release", tmp_path / "back")


def test_without_config_and_tokenizer_a_model_that_has_them_must_be_named(checkpoint, tmp_path):
    (checkpoint / "release" / "huggingface").rename(tmp_path / "elsewhere")
    assert "name a model directory or hub name that has them with --config-from" in refused(checkpoint, tmp_path / "back")
    convert(open_source(checkpoint, config_from=tmp_path / "elsewhere"), tmp_path / "back", to="huggingface")
    assert_same(read_tensors(tmp_path / "back"), read_tensors(tmp_path / "hf"))


def test_verify_computes_the_logits_of_both_models_in_both_directions(tmp_path):
    """The second time by the config of another directory, as of a checkpoint that Megatron wrote."""
    save_tiny("qwen2", tmp_path / "hf", tied=True)
    for words in (["hf", "dist", "--to", "torch_dist"], ["dist", "back", "--config-from", "./hf"]):
        done = run_main(main, "convert", *words, "--verify", cwd=tmp_path)
        assert done.returncode == 0 and "same best token for 100.0 %" in done.stdout, done.stderr
        shutil.rmtree(tmp_path / "dist" / "release" / "huggingface", ignore_errors=True)
    assert_same(read_tensors(tmp_path / "back"), read_tensors(tmp_path / "hf"))


def test_verify_refuses_another_model_s_checkpoint(tmp_path):
    for seed, name in enumerate(("one", "other")):
        save_tiny("qwen2", tmp_path / name, tied=True, seed=seed)
    convert(open_source(tmp_path / "other"), tmp_path / "dist", to="torch_dist")
    with pytest.raises(UserError, match="the logits of both models differ by"):
        verify(tmp_path / "one", open_source(tmp_path / "dist"), torch.float32)


def test_the_command_reports_what_it_wrote_and_what_the_target_lacks(tmp_path):
    write_model(tmp_path / "hf", Model("llama"))
    change_config(tmp_path / "hf", **rope_scaling("llama3"))
    there = run_main(main, "convert", "hf", "dist", "--to", "torch_dist", "--naming", "transformer_engine", cwd=tmp_path)
    assert there.returncode == 0 and there.stdout.startswith("dist: LlamaForCausalLM, 21 tensors, bfloat16\nnote: its arguments do not say")
    back = run_main(main, "convert", "dist", "back", cwd=tmp_path)
    assert back.returncode == 0 and (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    for words, message in (
        (["hf", "x", "--to", "torch_dist", "--tensor-parallel", "2"], "--tensor-parallel is about --to megatron"),
        (["hf", "x", "--config-from", "hf"], "--config-from is about a torch_dist source, but hf is none; leave it out"),
        (["dist", "x", "--to", "torch_dist", "--verify"], "needs Hugging Face on one side"),
    ):
        ended = run_main(main, "convert", *words, cwd=tmp_path)
        assert ended.returncode == 2 and message in ended.stderr and not (tmp_path / "x").exists()
