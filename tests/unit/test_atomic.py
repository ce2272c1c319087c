"""Directories and small files appear whole or not at all."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_aspo.common import atomic
from megatron_aspo.common.atomic import disk_errors, new_directory, publish, remove_directory, write_text
from megatron_aspo.common.errors import UserError

ROOT = Path(__file__).parents[2]


def test_a_directory_gets_its_name_only_when_it_is_complete(tmp_path):
    target = tmp_path / "deep" / "target"
    with new_directory(target) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_text("text")
        assert not target.exists() and directory.parent == target.parent
    assert (target / "sub" / "file").read_text() == "text"
    assert os.listdir(target.parent) == ["target"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, UserError])
def test_a_directory_that_cannot_be_completed_is_removed_and_the_error_propagates(tmp_path, error):
    with pytest.raises(error), new_directory(tmp_path / "target") as directory:
        (directory / "file").write_text("text")
        raise error
    assert os.listdir(tmp_path) == []


def test_only_leftovers_of_killed_processes_at_the_same_target_are_removed(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = f"target.unfinished-{socket.gethostname()}"
    stays = [f"{host}-{os.getppid()}", f"target.unfinished-elsewhere-{dead.pid}", f"other.unfinished-{socket.gethostname()}-{dead.pid}"]
    for name in (f"{host}-{dead.pid}", f"{host}-{os.getpid()}", *stays):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with new_directory(tmp_path / "target") as directory:
        assert os.listdir(directory) == []
    assert sorted(os.listdir(tmp_path)) == sorted([*stays, "target"])


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_an_existing_target_is_refused_and_unchanged(tmp_path, kind):
    target = tmp_path / "target"
    {"directory": target.mkdir, "file": target.touch, "dangling link": lambda: target.symlink_to("nowhere")}[kind]()
    with pytest.raises(UserError, match=f"{target} exists; choose another name, or remove it"), new_directory(target):
        raise AssertionError("the block was entered")
    assert os.listdir(tmp_path) == ["target"]


def test_a_target_that_appears_in_the_meantime_is_not_replaced(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(UserError, match="could not be written"), new_directory(target) as directory:
        (directory / "file").touch()
        target.mkdir()
        (target / "theirs").touch()
    assert os.listdir(tmp_path) == ["target"] and os.listdir(target) == ["theirs"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_user_error_with_the_remaining_space(tmp_path, number):
    target = tmp_path / "not" / "yet" / "target"
    with pytest.raises(UserError) as error, disk_errors(target, "nothing of it was left"):
        raise OSError(number, os.strerror(number))
    message = f"{target} could not be written: {os.strerror(number).lower()}; nothing of it was left; "
    assert re.fullmatch(re.escape(message) + rf"\d+\.\d\d GB are free in {tmp_path}: make room, or choose another place", str(error.value))


def test_any_other_error_of_the_file_system_is_a_user_error_with_its_reason(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"could not be written \(Not a directory\); nothing of it was left"),
        new_directory(tmp_path / "file" / "target"),
    ):
        raise AssertionError("the block was entered")


def test_every_file_and_directory_is_synced_before_the_rename_and_the_parent_after_it(tmp_path, monkeypatch):
    unfinished, target = tmp_path / "u", tmp_path / "target"
    (unfinished / "sub").mkdir(parents=True)
    for name in ("one", "sub/two"):
        (unfinished / name).touch()
    events = []
    monkeypatch.setattr(atomic, "sync", lambda path: events.append(path))
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    publish(unfinished, target)
    at = events.index("rename")
    assert set(events[:at]) == {unfinished, unfinished / "sub", unfinished / "one", unfinished / "sub" / "two"}
    assert events[at + 1 :] == [tmp_path]


def test_a_directory_is_renamed_before_it_is_removed(tmp_path, monkeypatch):
    (tmp_path / "target" / "sub").mkdir(parents=True)
    seen = []
    rmtree = atomic.shutil.rmtree
    monkeypatch.setattr(
        atomic.shutil, "rmtree", lambda path, **options: (seen.append((tmp_path / "target").exists()), rmtree(path, **options))
    )
    remove_directory(tmp_path / "target")
    assert seen[-1] is False and os.listdir(tmp_path) == []


def test_a_small_file_is_replaced_atomically(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_text(file, "old ×")
    assert file.read_text(encoding="utf-8") == "old ×"

    def torn(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", torn)
    with pytest.raises(OSError):
        write_text(file, "new")
    assert file.read_text(encoding="utf-8") == "old ×"


def test_a_process_killed_while_filling_a_directory_leaves_nothing_under_its_name(tmp_path):
    script = f"""
        import os, signal
        from pathlib import Path
        from megatron_aspo.common.atomic import new_directory
        with new_directory(Path({str(tmp_path / "target")!r})) as directory:
            (directory / "file").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, timeout=60)
    assert result.returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith("target.unfinished-")
    # The next attempt is not blocked.
    with new_directory(tmp_path / "target") as directory:
        (directory / "file").write_text("whole")
    assert (tmp_path / "target" / "file").read_text() == "whole"
