"""Files and directories that appear whole or not at all, whatever is killed or runs full on the way."""

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from megatron_aspo.common.errors import UserError


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory beside `target` to be filled; it takes the target's name when the block ends, and is removed when the block fails.

    What a killed process of this host left of an earlier attempt at the same target is removed first.
    Raises UserError when the target exists or the disk does not take it.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; choose another name, or remove it")
    prefix = f"{target.name}.unfinished-{socket.gethostname()}-"
    unfinished = target.with_name(f"{prefix}{os.getpid()}")
    made = [parent for parent in target.parents if not parent.exists()]
    with disk_errors(target, "nothing of it was left"):
        _sweep(target.parent, prefix)
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
            publish(unfinished, target)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            with contextlib.suppress(OSError):  # others may have put something there meanwhile
                for parent in made:
                    parent.rmdir()
            raise


def _sweep(directory: Path, prefix: str) -> None:
    if directory.is_dir():
        for path in directory.iterdir():
            pid = path.name.removeprefix(prefix)
            if path.name.startswith(prefix) and pid.isdigit() and not (psutil.pid_exists(int(pid)) and int(pid) != os.getpid()):
                shutil.rmtree(path)


def publish(unfinished: Path, target: Path) -> None:
    """Everything below `unfinished` reaches the disk, then it is renamed. Raises OSError when `target` exists and is not empty."""
    sync_files(unfinished)
    os.rename(unfinished, target)
    sync(target.parent)


def remove_directory(directory: Path) -> None:
    """Remove a directory without ever leaving part of it under its name."""
    doomed = directory.with_name(f"{directory.name}.unfinished-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(directory, doomed)
    shutil.rmtree(doomed)


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    beside = path.with_name(f".{path.name}.unfinished")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """What stands at `path` is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(top: Path) -> None:
    """Everything below `top` is on the disk when this returns."""
    for directory, _, names in os.walk(top):
        for name in names:
            sync(Path(directory, name))
        sync(Path(directory))


@contextmanager
def disk_errors(target: Path, outcome: str = "what stood there before still does") -> Iterator[None]:
    """What the file system refuses, said as a mistake that the user can cure; outcome: what became of `target`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{target} could not be written: {error.strerror.lower()}; {outcome}; {_space(target)}") from error
        reason = error.strerror or error
        raise UserError(f"{target} could not be written ({reason}); {outcome}; choose another place") from error


def _space(target: Path) -> str:
    place = next((p for p in target.parents if p.is_dir()), Path("/"))
    return f"{shutil.disk_usage(place).free / 1e9:.2f} GB are free in {place}: make room, or choose another place"
