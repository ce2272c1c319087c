"""Conversions of damaged checkpoints, on full disks, and killed ones: anything incomplete is refused, and nothing partial gets the name."""

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

from megatron_aspo.checkpoint.convert import convert, open_source
from megatron_aspo.weights.layout import ParallelSizes
from tests.unit.hf_shards import Model, assert_same, flipped_bit, read_tensors, write_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole_checkpoint(tmp_path_factory) -> Path:
    """Return a checkpoint that is converted once; tests damage copies."""
    room = tmp_path_factory.mktemp("whole")
    write_model(room / "hf", Model(layers=2), files=2)
    convert(open_source(room / "hf"), room / "step_1", to="megatron", sizes=ParallelSizes(tensor=2, pipeline=2))
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
def test_a_flipped_bit_anywhere_in_a_checkpoint_is_refused(checkpoint, tmp_path, refused, data):
    name = data.draw(st.sampled_from(files_of(checkpoint)))
    with flipped_bit(checkpoint / name, data.draw):
        line = refused(checkpoint, tmp_path / "target")
    assert str(checkpoint) in line and (name == "SHA256SUMS" or name in line)


def rewrite_sums(checkpoint: Path) -> None:
    """Make the list of hashes agree with the files, as an attacker may."""
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
    ("changes", "message"),
    [
        ({"sizes": {"tensor": 4, "pipeline": 2}}, "rank_"),
        ({"sizes": {"tensor": 1, "pipeline": 2}}, "rank_"),
        ({"sizes": {"tensor": 2, "pipeline": 1}}, "rank_"),
        ({"naming": "transformer_engine"}, "rank_00000.safetensors"),
        ({"dtype": "float32"}, "is not the tensor that the manifest states"),
        ({"format": 2}, "format 2, this version reads 1"),
    ],
)
def test_a_manifest_that_does_not_match_its_files_is_refused(checkpoint, tmp_path, refused, changes, message):
    values = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(values | changes))
    rewrite_sums(checkpoint)
    assert message in refused(checkpoint, tmp_path / "target")


# --- the machine --------------------------------------------------------------------------------------------------------------------------

# Loops in one process over sizes of the file system; prints the message and the files left for each.
FILL = """
import contextlib, io, json, os, resource, signal, subprocess, sys
import torch
from megatron_aspo.cli import main
torch.set_num_threads(1)
mechanism, directory, source = sys.argv[1:4]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for size in map(int, sys.argv[4:]):
    if mechanism == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", directory], check=True)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            main(["convert", source, os.path.join(directory, "target")])
    except SystemExit as exit:
        print(json.dumps({"size": size, "status": exit.code, "printed": printed.getvalue(), "left": os.listdir(directory)}), flush=True)
    if mechanism == "tmpfs":
        subprocess.run(["umount", "-l", directory], check=True)
"""


@pytest.mark.parametrize("kind", ["hugging_face", "megatron"])
def test_a_full_disk_ends_the_conversion_and_nothing_is_left(tmp_path, kind):
    """A small tmpfs of a user namespace where the system allows one, else a limit on file sizes: the kernel refuses either way."""
    model = Model(layers=4, hidden=64, heads=8, head_dim=16, ffn=128, vocab=500)
    source = tmp_path / "hf"
    write_model(source, model)
    if kind == "megatron":
        convert(open_source(source), tmp_path / "megatron", to="megatron", sizes=ParallelSizes(pipeline=2))
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
        (line,) = outcome["printed"].splitlines()
        assert f"{room / 'target'} could not be written" in line and "nothing of it was left" in line, outcome
        if tmpfs:
            assert "no space left on device" in line and f"GB are free in {room}: make room, or choose another place" in line
    assert (ample["status"], ample["left"]) == (0, ["target"]), ample


# Kills itself at the n-th step that reaches the file system, in a forked child for each n.
KILL = """
import itertools, json, os, signal, sys
from pathlib import Path
import torch
from megatron_aspo.checkpoint import manifest
from megatron_aspo.hf import tensor_file
from megatron_aspo.common import atomic
from megatron_aspo.checkpoint.convert import convert, open_source
from megatron_aspo.weights.layout import ParallelSizes
torch.set_num_threads(1)
source, room, to = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

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
    convert(open_source(source), room / str(n), to=to, sizes=ParallelSizes(), shard_bytes=2000)

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


@pytest.mark.parametrize("target", ["megatron", "torch_dist", "huggingface"])
def test_a_conversion_killed_at_any_step_leaves_no_target(tmp_path, whole_checkpoint, target):
    tensors = write_model(tmp_path / "hf", Model(layers=2))
    source = whole_checkpoint if target == "huggingface" else tmp_path / "hf"
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "target"], "files of the killed conversion are left"
    convert(open_source(tmp_path / "target"), tmp_path / "back", to="huggingface", sizes=ParallelSizes())
    assert_same(read_tensors(tmp_path / "back"), tensors)
