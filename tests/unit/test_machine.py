"""A missing prerequisite of the machine is named with its cure before Ray is started."""

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.rollout.engine_layout import EngineSizes
from megatron_aspo.runtime import machine
from megatron_aspo.runtime.machine import check_can_be_made, check_machine

ONE = EngineSizes()


@pytest.fixture(autouse=True)
def plain(monkeypatch, tmp_path):
    """A machine that meets all requirements."""
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("HOME", str(tmp_path))


def refused(message: str, engines: EngineSizes = ONE) -> None:
    with pytest.raises(UserError, match=message) as error:
        check_machine(engines)
    assert "\n" not in str(error.value)


def test_a_plain_machine_is_accepted(tmp_path):
    check_machine(EngineSizes(tensor=2))
    assert not list((tmp_path / ".ray").iterdir())


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_directory_with_too_long_socket_paths_is_refused(monkeypatch, tmp_path, variable):
    directory = tmp_path / ("x" * 60)
    directory.mkdir()
    monkeypatch.setenv(variable, str(directory))
    refused(rf"{variable}=.*xxx is too long: .* set RAY_TMPDIR to a directory whose path has at most \d\d bytes, such as /tmp")


def test_the_sockets_of_engines_count_too(monkeypatch, tmp_path):
    directory = tmp_path / ("x" * 60)
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    refused(r"TMPDIR=.*xxx is too long: the paths of vLLM's sockets .* set TMPDIR to a directory whose path has at most 70 bytes")


@pytest.mark.parametrize("where", ["/proc", "/dev/null"])
def test_a_temporary_directory_that_cannot_be_written_is_refused(monkeypatch, where):
    monkeypatch.setenv("RAY_TMPDIR", where)
    refused(rf"RAY_TMPDIR={where}: Ray cannot write there .*; set RAY_TMPDIR to a directory that can be written")


@pytest.mark.parametrize("home", ["/proc", "/dev/null", "/proc/nowhere"])
def test_a_home_that_cannot_be_written_is_refused_unless_ray_is_given_its_token(monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    refused(rf"HOME={home}: Ray cannot write its token .*; set HOME to a directory that can be written")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    check_machine(EngineSizes())


def test_a_user_without_a_home_is_refused(monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    refused("no home directory.*set HOME to a directory that can be written")


@pytest.mark.parametrize("path", ["/proc/nowhere/run", "/dev/null/run"])
def test_a_run_directory_that_could_not_be_made_is_refused_before_anything_is_started(tmp_path, path):
    with pytest.raises(UserError, match=f"run directory {path} cannot be made: .*; choose another run_dir"):
        check_can_be_made(Path(path))
    check_can_be_made(tmp_path / "runs" / "one")
    assert not (tmp_path / "runs").exists()


def test_shared_memory_that_is_read_only_or_full_is_refused(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=200 << 20))
    check_machine(EngineSizes(tensor=1, engines=4))
    check_machine(EngineSizes(tensor=2))
    refused(
        r"/dev/shm has 200 MiB free, .* 2 engines .* 320 MiB .*--shm-size=1g.*, or set rollout.tensor_parallel=1", EngineSizes(2, engines=2)
    )
    monkeypatch.setattr(machine, "SHARED", Path("/proc"))
    refused("/proc cannot be written .*--shm-size")
