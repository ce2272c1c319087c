"""A checkpoint verifies itself: a difference in one bit, one file or one name is refused by that file."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from megatron_aspo.checkpoint.manifest import Manifest, is_checkpoint, load_manifest, read_manifest, sha256_of, write_manifest
from megatron_aspo.common.errors import UserError
from megatron_aspo.weights.layout import ParallelSizes
from tests.unit.hf_shards import flipped_bit

MANIFEST = Manifest(
    "LlamaForCausalLM", "bfloat16", "local", ParallelSizes(2, 2, 3, 1, 4, 1), {"t": "0" * 64}, {"step": 3, "data": {"epoch": 1}}
)
FILES = {"model/rank_00000.safetensors": b"weights" * 100, "huggingface/config.json": b"{}", "config.yaml": b"seed: 1\n"}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    directory = tmp_path / "step_1"
    for name, content in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    write_manifest(directory, MANIFEST, {})
    return directory


def everything(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_a_written_manifest_is_read_back(checkpoint):
    assert read_manifest(checkpoint) == load_manifest(checkpoint) == MANIFEST


def test_sha256sum_agrees(checkpoint):
    assert everything(checkpoint) == sorted([*FILES, "SHA256SUMS", "manifest.json"])
    result = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=checkpoint, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.splitlines() == [f"{name}: OK" for name in sorted([*FILES, "manifest.json"])]


def test_a_hash_computed_while_writing_is_not_computed_again(checkpoint):
    (checkpoint / "SHA256SUMS").unlink()
    write_manifest(checkpoint, MANIFEST, {"config.yaml": "a" * 64})
    assert f"{'a' * 64}  config.yaml" in (checkpoint / "SHA256SUMS").read_text().splitlines()
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        read_manifest(checkpoint)


def test_a_file_that_another_process_wrote_and_this_one_does_not_see_is_refused(checkpoint):
    with pytest.raises(UserError, match=r"rank_00001\.safetensors was written but is not there: all processes need the same file system"):
        write_manifest(checkpoint, MANIFEST, {"model/rank_00001.safetensors": "a" * 64})


@pytest.mark.parametrize("name", [*FILES, "manifest.json", "SHA256SUMS"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_refused_by_the_file(checkpoint, name, data):
    """A bit of SHA256SUMS damages that file, or a hash or name of another, which is then named."""
    with flipped_bit(checkpoint / name, data.draw), pytest.raises(UserError, match=r"damaged|missing|not listed") as error:
        read_manifest(checkpoint)
    assert str(checkpoint) in str(error.value) and (name == "SHA256SUMS" or str(checkpoint / name) in str(error.value))


@pytest.mark.parametrize("cut", [0, 1, 0.5, -1])
@pytest.mark.parametrize("name", [*FILES, "manifest.json", "SHA256SUMS"])
def test_a_truncated_file_is_refused(checkpoint, name, cut):
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: int(cut * len(content)) if isinstance(cut, float) else cut])
    with pytest.raises(UserError, match=r"damaged|not listed|missing") as error:
        read_manifest(checkpoint)
    assert name == "SHA256SUMS" or str(checkpoint / name) in str(error.value)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_file_is_refused_by_name(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        read_manifest(checkpoint)


def test_a_missing_list_of_hashes_is_refused(checkpoint):
    (checkpoint / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match="SHA256SUMS is damaged or missing"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("name", ["extra", "model/rank_00001.safetensors", "huggingface/.hidden", "link"])
def test_a_file_that_was_added_is_refused_by_name(checkpoint, name):
    if name == "link":
        (checkpoint / name).symlink_to("config.yaml")
    else:
        (checkpoint / name).touch()
    with pytest.raises(UserError, match=f"{name} is not listed in SHA256SUMS"):
        read_manifest(checkpoint)


def test_names_that_swap_contents_are_refused(checkpoint):
    a, b = checkpoint / "config.yaml", checkpoint / "huggingface" / "config.json"
    a.rename(checkpoint / "x"), b.rename(a), (checkpoint / "x").rename(b)
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        read_manifest(checkpoint)


def test_a_format_of_another_version_is_refused(checkpoint):
    values = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "SHA256SUMS").unlink()
    (checkpoint / "manifest.json").write_text(json.dumps(values | {"format": 99}))
    with pytest.raises(UserError, match="has format 99, this version reads 1"):
        load_manifest(checkpoint)


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path):
    assert not is_checkpoint(tmp_path)
    with pytest.raises(UserError, match="is no checkpoint of ours"):
        read_manifest(tmp_path)


def test_a_checkpoint_without_its_manifest_is_still_recognised(checkpoint):
    (checkpoint / "manifest.json").unlink()
    assert is_checkpoint(checkpoint)
    shutil.rmtree(checkpoint / "huggingface")
    assert not is_checkpoint(checkpoint)


def test_hashes_are_of_the_whole_file(tmp_path):
    (tmp_path / "large").write_bytes(bytes(9 << 20))
    expected = subprocess.run(["sha256sum", tmp_path / "large"], capture_output=True, text=True).stdout.split()[0]
    assert sha256_of(tmp_path / "large") == expected
