"""A conversion that cannot be whole ends with status 2 and one line that names the thing and the cure, and leaves nothing behind."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save_file

from megatron_aspo.checkpoint.convert import convert, open_source
from megatron_aspo.cli import main
from megatron_aspo.weights.layout import ParallelSizes
from tests.unit.hf_shards import Model, assert_same, read_tensors, write_model, write_tensors

ROOT = Path(__file__).parents[2]
NORM, EMBEDDING, Q = "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def signals_stay_pytests(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.fixture
def hf(tmp_path) -> Path:
    write_model(tmp_path / "hf", Model(), files=2)
    return tmp_path / "hf"


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs the command, which must be refused without a trace; returns its one line."""

    def run(*arguments: object) -> str:
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as exit:
            main(["convert", *map(str, arguments)])
        assert exit.value.code == 2
        assert contents(tmp_path) == before
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("megatron-aspo: error: ")
        return line.removeprefix("megatron-aspo: error: ")

    return run


def contents(directory: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(directory.rglob("*"))}


def change_tensors(directory: Path, change) -> None:
    tensors = read_tensors(directory)
    change(tensors)
    write_tensors(directory, tensors, 2)


def change_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def file_of(directory: Path, tensor: str) -> Path:
    return directory / json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][tensor]


# --- the tensors of a Hugging Face directory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(NORM), [f"lacks {NORM}", "1 missing, 0 unknown", "get the model again, or correct config.json"]),
        (lambda t: t.pop(Q), [f"lacks {Q}", "get the model again"]),
        (lambda t: t.update(strange=torch.zeros(2)), ["unknown tensor strange", "0 missing, 1 unknown", "correct config.json"]),
        (lambda t: t.update({NORM: torch.zeros(11).bfloat16()}), [NORM, "has shape (11,); config.json says (12,)", "get it again"]),
        (lambda t: t.update({Q: t[Q].T.contiguous()}), [Q, "has shape (12, 8); config.json says (8, 12)"]),
        (lambda t: t.update({EMBEDDING: t[EMBEDDING][None]}), [EMBEDDING, "has shape (1, 19, 12)"]),
        (lambda t: t.update({Q: torch.zeros(8, 12, dtype=torch.int8)}), [Q, "element type I8", "F32, BF16, F16", "unquantized"]),
        (lambda t: t.update({Q: torch.zeros(8, 12, dtype=torch.float64)}), [Q, "element type F64"]),
        (lambda t: t.update({Q: torch.zeros(8, 12, dtype=torch.float8_e4m3fn)}), [Q, "element type F8_E4M3", "unquantized"]),
        (lambda t: t.update({Q: t[Q].float()}), [f"{Q} is float32, the model bfloat16", "choose one element type for all with --dtype"]),
    ],
    ids=["missing", "missing in a layer", "extra", "shape", "transposed", "rank", "int8", "float64", "float8", "mixed"],
)
def test_a_tensor_that_is_not_as_the_config_says_is_refused_by_name(hf, tmp_path, refused, change, said):
    change_tensors(hf, change)
    for arguments in ([], ["--tensor-parallel", 2], ["--to", "huggingface"]):
        line = refused(hf, tmp_path / "target", *arguments)
        for words in (*said, str(hf)):
            assert words in line


def test_a_dtype_for_all_does_not_make_integers_weights(hf, tmp_path, refused):
    change_tensors(hf, lambda t: t.update({Q: torch.zeros(8, 12, dtype=torch.int8)}))
    assert "element type I8" in refused(hf, tmp_path / "target", "--dtype", "float32")


@pytest.mark.parametrize("cut", [0, 7, 100, -1, -24])
def test_a_truncated_file_is_refused_by_name(hf, tmp_path, refused, cut):
    file = file_of(hf, Q)
    file.write_bytes(file.read_bytes()[:cut])
    line = refused(hf, tmp_path / "target")
    assert str(file) in line and "damaged or incomplete, copy it again" in line


def test_a_key_in_two_files_is_refused_with_both(hf, tmp_path, refused):
    tensors = read_tensors(hf)
    other = next(file for file in hf.glob("*.safetensors") if file != file_of(hf, Q))
    save_file({name: t for name, t in tensors.items() if file_of(hf, name) == other} | {Q: tensors[Q]}, other)
    line = refused(hf, tmp_path / "target")
    assert f"{Q} stands in both" in line and file_of(hf, Q).name in line and other.name in line and "keep one of them" in line


def test_an_index_that_names_a_file_without_the_tensor_is_refused_by_the_tensor(hf, tmp_path, refused):
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    right = index["weight_map"][Q]
    index["weight_map"][Q] = next(file for file in index["weight_map"].values() if file != right)
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    line = refused(hf, tmp_path / "target")
    assert Q in line and index["weight_map"][Q] in line and "does not hold it" in line and "get the model again" in line


def test_an_index_that_names_a_file_that_is_missing_is_refused_by_the_file(hf, tmp_path, refused):
    file = file_of(hf, Q)
    file.unlink()
    line = refused(hf, tmp_path / "target")
    assert str(file) in line and "copy it again" in line


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\x00"])
def test_an_index_that_is_none_is_refused_by_name(hf, tmp_path, refused, text):
    (hf / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refused(hf, tmp_path / "target")


def test_a_directory_without_weights_is_refused_with_the_cure(hf, tmp_path, refused):
    for file in hf.glob("*.safetensors*"):
        file.unlink()
    (hf / "pytorch_model.bin").touch()
    assert "no .safetensors file; convert the model to safetensors first" in refused(hf, tmp_path / "target")


@pytest.mark.parametrize(
    "head",
    [
        lambda e: e + 1,
        lambda e: e[:-1].clone(),
        lambda e: e.float() + 1e-3,
        lambda e: torch.zeros(e.shape, dtype=torch.int8),
    ],
    ids=["values", "shape", "element type", "integers"],
)
def test_a_tied_model_whose_head_differs_is_refused_by_name(tmp_path, refused, head):
    tensors = write_model(tmp_path / "hf", Model(tied=True))
    tensors[EMBEDDING] = torch.randn(19, 12).bfloat16()
    save_file(tensors | {"lm_head.weight": head(tensors[EMBEDDING])}, tmp_path / "hf" / "model.safetensors")
    line = refused(tmp_path / "hf", tmp_path / "target")
    assert "lm_head.weight" in line and EMBEDDING in line
    assert "set tie_word_embeddings to false, or remove lm_head.weight" in line


# --- its config ---------------------------------------------------------------------------------------------------------------------------


def rope(kind: str, **more) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0} | more}


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", rope("linear"), "rope_type=linear is not supported for LlamaForCausalLM; expected default"),
        ("qwen2", rope("dynamic"), "rope_type=dynamic is not supported"),
        ("qwen3", rope("yarn", original_max_position_embeddings=32), "rope_type=yarn is not supported"),
        (
            "llama",
            rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
            "rope_type=llama3 is not supported",
        ),
        ("llama", {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type=linear is not supported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu is not supported for LlamaForCausalLM; expected silu"),
        ("mixtral", {"hidden_act": "relu"}, "hidden_act=relu is not supported for MixtralForCausalLM; expected silu"),
        ("qwen3_moe", {"hidden_act": "gelu_new"}, "hidden_act=gelu_new is not supported for Qwen3MoeForCausalLM; expected silu"),
        ("llama", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True is not supported"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "use_sliding_window=True is not supported"),
        ("mixtral", {"sliding_window": 8}, "sliding_window=8 is not supported"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers=[1] is not supported"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
        ("llama", {"architectures": ["FalconForCausalLM"]}, "architecture FalconForCausalLM is not supported; expected one of"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ("llama", {"num_hidden_layers": 3}, "lacks model.layers.2."),
        ("llama", {"num_hidden_layers": 1}, "unknown tensor model.layers.1."),
    ],
)
def test_a_setting_that_the_family_does_not_support_is_refused_by_the_setting(tmp_path, refused, family, changes, said):
    write_model(tmp_path / "hf", Model(family))
    change_config(tmp_path / "hf", **changes)
    assert said in refused(tmp_path / "hf", tmp_path / "target")


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"model_type": "llama"}', '"\\ud800"', "\x00\xff"])
def test_a_config_that_is_none_is_refused_by_name(hf, tmp_path, refused, text):
    (hf / "config.json").write_bytes(text.encode("latin-1"))
    line = refused(hf, tmp_path / "target")
    assert str(hf) in line and ("config.json" in line or "architecture" in line)


# --- source, target, layout ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere", "deep/nowhere"])
def test_a_source_that_is_missing_is_refused(tmp_path, refused, name):
    assert f"{tmp_path / name}: there is no such directory" in refused(tmp_path / name, tmp_path / "target")


def test_a_relative_source_that_is_missing_is_not_asked_of_the_hub(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no such directory" in refused("./nowhere", tmp_path / "target")


def test_a_source_that_is_a_file_or_an_empty_directory_is_refused(tmp_path, refused):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert "is a file; name the Hugging Face model directory" in refused(tmp_path / "file", tmp_path / "target")
    assert "has no config.json" in refused(tmp_path / "empty", tmp_path / "target")


def test_a_target_that_exists_is_refused_and_left_alone(hf, tmp_path, refused):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "theirs").write_text("kept")
    assert f"{tmp_path / 'target'} exists; choose another name, or remove it" in refused(hf, tmp_path / "target")
    assert "exists" in refused(hf, hf)


@pytest.mark.parametrize("place", ["file/target", "/proc/nowhere/target"])
def test_a_target_in_a_place_that_cannot_be_written_is_refused(hf, tmp_path, refused, place):
    (tmp_path / "file").touch()
    line = refused(hf, tmp_path / place)
    assert f"{tmp_path / place} could not be written" in line and "choose another place" in line


@pytest.mark.parametrize(
    ("family", "arguments", "said"),
    [
        ("qwen2", ["--tensor-parallel", 3], [" 3 does not divide the model's 4 attention heads", "choose one of [1, 2, 4]"]),
        ("qwen2", ["--pipeline-parallel", 4], [" 4 does not divide the model's 2 layers", "choose one of [1, 2]"]),
        ("qwen2", ["--pipeline-parallel", 2, "--virtual-pipeline", 2], ["does not divide the model's 2 layers", "must be one of [1, 2]"]),
        ("qwen2", ["--virtual-pipeline", 2], ["virtual", "set it to 1"]),
        ("qwen2", ["--expert-parallel", 2], ["the model has no experts", "leave them out"]),
        ("mixtral", ["--expert-parallel", 3], [" 3 does not divide the model's 4 experts", "choose one of [1, 2, 4]"]),
        ("qwen3_moe", ["--expert-tensor-parallel", 3], [" 3 does not divide the 8 feed-forward channels", "choose one of [1, 2, 4, 8]"]),
    ],
)
def test_a_layout_that_cannot_cut_the_model_is_refused_with_the_choices(tmp_path, refused, family, arguments, said):
    write_model(tmp_path / "hf", Model(family))
    line = refused(tmp_path / "hf", tmp_path / "target", *arguments)
    for words in said:
        assert words in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "huggingface", "--tensor-parallel", 2], "--tensor-parallel is about a Megatron target"),
        (["--to", "huggingface", "--naming", "local"], "--naming is about a Megatron target"),
        (["--max-shard-gb", 1], "--max-shard-gb 1.0 is about a Hugging Face target"),
        (["--to", "huggingface", "--max-shard-gb", 0], "must be above 0"),
        (["--to", "huggingface", "--max-shard-gb", -1], "must be above 0"),
        (["--to", "huggingface", "--max-shard-gb", "nan"], "must be above 0"),
        (["--to", "huggingface", "--max-shard-gb", "1e-12"], "--max-shard-gb"),
        (["--to", "huggingface", "--verify"], "source and target are of one kind"),
    ],
)
def test_options_that_contradict_each_other_are_refused(hf, tmp_path, refused, arguments, said):
    assert said in refused(hf, tmp_path / "target", *arguments)


def test_an_endless_shard_is_one_file(hf, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["convert", str(hf), str(tmp_path / "target"), "--to", "huggingface", "--max-shard-gb", "inf"])
    assert exit.value.code == 0, capsys.readouterr().err
    assert (tmp_path / "target" / "model.safetensors").is_file()


# --- checkpoints that are damaged ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_checkpoint(tmp_path_factory) -> Path:
    """Converted once; tests damage copies."""
    room = tmp_path_factory.mktemp("whole")
    write_model(room / "hf", Model(layers=2), files=2)
    convert(open_source(room / "hf"), room / "step_1", to_megatron=True, sizes=ParallelSizes(tensor=2, pipeline=2))
    return room / "step_1"


def files_of(checkpoint: Path) -> list[str]:
    return sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())


@pytest.fixture
def checkpoint(tmp_path, whole_checkpoint) -> Path:
    return Path(shutil.copytree(whole_checkpoint, tmp_path / "step_1"))


def test_every_file_of_a_checkpoint_that_is_truncated_is_refused(checkpoint, tmp_path, refused):
    for name in files_of(checkpoint):
        content = (checkpoint / name).read_bytes()
        for length in {0, len(content) // 2, len(content) - 1}:
            (checkpoint / name).write_bytes(content[:length])
            line = refused(checkpoint, tmp_path / "target")
            assert str(checkpoint) in line and (name == "SHA256SUMS" or name in line)
        (checkpoint / name).write_bytes(content)


def test_every_file_of_a_checkpoint_that_is_removed_is_refused(checkpoint, tmp_path, refused):
    for name in files_of(checkpoint):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).unlink()
        line = refused(checkpoint, tmp_path / "target", "--tensor-parallel", 1, "--to", "megatron")
        assert name in line and "missing" in line
        (checkpoint / name).write_bytes(content)


@pytest.mark.parametrize("name", ["model/rank_00004.safetensors", "huggingface/added.json", "added", "optimizer/rank_00000.safetensors"])
def test_a_file_added_to_a_checkpoint_is_refused(checkpoint, tmp_path, refused, name):
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).touch()
    line = refused(checkpoint, tmp_path / "target")
    assert name in line and "not listed" in line


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_bit_that_flips_anywhere_in_a_checkpoint_is_refused(checkpoint, tmp_path, refused, data):
    name = data.draw(st.sampled_from(files_of(checkpoint)))
    content = bytearray((checkpoint / name).read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    (checkpoint / name).write_bytes(flipped)
    try:
        line = refused(checkpoint, tmp_path / "target")
        assert str(checkpoint) in line and (name == "SHA256SUMS" or name in line)
    finally:
        (checkpoint / name).write_bytes(content)


def rewrite_sums(checkpoint: Path) -> None:
    """Make the list of hashes agree with the files: someone who tampers may do so too."""
    names = [name for name in files_of(checkpoint) if name != "SHA256SUMS"]
    result = subprocess.run(["sha256sum", *names], cwd=checkpoint, capture_output=True, text=True, check=True)
    (checkpoint / "SHA256SUMS").write_text(result.stdout)


def test_weights_changed_together_with_their_file_hash_are_refused_by_the_tensor(checkpoint, tmp_path, refused):
    file = checkpoint / "model" / "rank_00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    rewrite_sums(checkpoint)
    for arguments in (["--to", "huggingface"], ["--to", "megatron", "--tensor-parallel", 4]):
        assert re.search(r"(model|lm_head)\.\S+", refused(checkpoint, tmp_path / "target", *arguments))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sizes": {"tensor": 4, "pipeline": 2}}, "rank_"),
        ({"sizes": {"tensor": 1, "pipeline": 2}}, "rank_"),
        ({"sizes": {"tensor": 2, "pipeline": 1}}, "rank_"),
        ({"naming": "transformer_engine"}, "rank_00000.safetensors"),
        ({"dtype": "float32"}, "is not the tensor that the manifest states"),
        ({"format": 2}, "format 2, this version reads 1"),
    ],
)
def test_a_manifest_that_does_not_fit_its_files_is_refused(checkpoint, tmp_path, refused, changes, said):
    values = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(values | changes))
    rewrite_sums(checkpoint)
    assert said in refused(checkpoint, tmp_path / "target")


# --- the machine --------------------------------------------------------------------------------------------------------------------------

# Loops in one process over sizes of the file system; prints for each what was said and what was left.
FILL = """
import contextlib, io, json, os, resource, signal, subprocess, sys
import torch
from megatron_aspo.cli import main
torch.set_num_threads(1)
mechanism, place, source = sys.argv[1:4]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for size in map(int, sys.argv[4:]):
    if mechanism == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            main(["convert", source, os.path.join(place, "target")])
    except SystemExit as exit:
        print(json.dumps({"size": size, "status": exit.code, "said": said.getvalue(), "left": os.listdir(place)}), flush=True)
    if mechanism == "tmpfs":
        subprocess.run(["umount", "-l", place], check=True)
"""


@pytest.mark.parametrize("kind", ["hugging_face", "megatron"])
def test_a_disk_that_is_full_ends_the_conversion_and_nothing_is_left(tmp_path, kind):
    """A small tmpfs of a user namespace where the system allows one, else a limit on the size of files: the kernel refuses either way."""
    model = Model(layers=4, hidden=64, heads=8, head_dim=16, ffn=128, vocab=500)
    source = tmp_path / "hf"
    write_model(source, model)
    if kind == "megatron":
        convert(open_source(source), tmp_path / "megatron", to_megatron=True, sizes=ParallelSizes(pipeline=2))
        source = tmp_path / "megatron"
    room = tmp_path / "room"
    room.mkdir()
    allowed = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", str(room)]
    tmpfs = shutil.which("unshare") is not None and subprocess.run(allowed, capture_output=True).returncode == 0
    sizes = (4096, 8192, 20_480, 40_960, 102_400, 307_200, 409_600, 8 << 20) if tmpfs else (10, 100, 1000, 10_000, 100_000, 8 << 20)
    prefix = allowed[:4] if tmpfs else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*prefix, sys.executable, "-c", FILL, "tmpfs" if tmpfs else "limit", room, source, *map(str, sizes)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    *full, ample = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(full) == len(sizes) - 1
    for outcome in full:
        assert outcome["status"] == 2 and outcome["left"] == [], outcome
        (line,) = outcome["said"].splitlines()
        assert f"{room / 'target'} could not be written" in line and "nothing of it was left" in line, outcome
        if tmpfs:
            assert "no space left on device" in line and f"GB are free in {room}: make room, or choose another place" in line
    assert (ample["status"], ample["left"]) == (0, ["target"]), ample


# Kills itself at the n-th step that reaches the file system, in a forked child for each n.
KILL = """
import itertools, json, os, signal, sys
from pathlib import Path
import torch
from megatron_aspo.checkpoint import atomic, manifest, tensor_file
from megatron_aspo.checkpoint.convert import convert, open_source
from megatron_aspo.weights.layout import ParallelSizes
torch.set_num_threads(1)
source, room, to_megatron = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "megatron"

def run(n):
    count = itertools.count()
    def dying(function):
        def call(*arguments, **options):
            if next(count) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call
    tensor_file.TensorFileWriter.write = dying(tensor_file.TensorFileWriter.write)
    os.fsync, os.rename, Path.write_text = dying(os.fsync), dying(os.rename), dying(Path.write_text)
    convert(open_source(source), room / str(n), to_megatron=to_megatron, sizes=ParallelSizes(), shard_bytes=2000)

open_source(source)  # imports once for all children
for n in itertools.count(0, 3):
    child = os.fork()
    if not child:
        run(n)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(json.dumps({"n": n, "killed": os.WIFSIGNALED(status), "status": status, "there": (room / str(n)).exists()}), flush=True)
    if not os.WIFSIGNALED(status):
        break
"""


@pytest.mark.parametrize("target", ["megatron", "hugging_face"])
def test_a_conversion_killed_at_any_step_leaves_no_target(tmp_path, whole_checkpoint, target):
    tensors = write_model(tmp_path / "hf", Model(layers=2))
    source = tmp_path / "hf" if target == "megatron" else whole_checkpoint
    (tmp_path / "room").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", KILL, source, tmp_path / "room", target],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    *killed, done = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(killed) > 5 and done["status"] == 0 and done["there"], result.stderr
    for outcome in killed:
        if outcome["there"]:  # killed after the rename
            read = open_source(tmp_path / "room" / str(outcome["n"])).reader
            assert set(read.dtypes) == set(tensors)
    assert [outcome["there"] for outcome in killed[:-1]] == [False] * (len(killed) - 1)


def test_a_conversion_killed_from_outside_leaves_no_target_and_can_be_run_again(tmp_path):
    tensors = write_model(tmp_path / "hf", Model(layers=8, hidden=512, heads=8, head_dim=64, ffn=1024, vocab=4000), torch.float32)
    command = [sys.executable, "-m", "megatron_aspo", "convert", tmp_path / "hf", tmp_path / "target"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    half = sum(t.nbytes for t in tensors.values()) // 2
    for _ in itertools.count():
        assert process.poll() is None, f"it ended before it was killed: {process.communicate()}"
        if sum(file.stat().st_size for file in tmp_path.glob("target.unfinished-*/model/*")) > half:
            break
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert not (tmp_path / "target").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    convert(open_source(tmp_path / "target"), tmp_path / "back", to_megatron=False, sizes=ParallelSizes())
    assert_same(read_tensors(tmp_path / "back"), tensors)
