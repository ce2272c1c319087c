"""Files and directories that appear whole or not at all, even if the process is killed or the disk fills up."""

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
    """Yield a directory beside `target` to fill. It is renamed to `target` when the block ends and removed when the block fails.

    Leftovers of earlier attempts at the same target by dead processes of this host are removed first.
    Raises UserError when the target exists or cannot be written to disk.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; choose another name, or remove it")
    prefix = f"{target.name}.unfinished-{socket.gethostname()}-"
    unfinished = target.with_name(f"{prefix}{os.getpid()}")
    made = [parent for parent in target.parents if not parent.exists()]
    with disk_errors(target, "nothing of it was left"):
        _remove_leftovers(target.parent, prefix)
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
            publish(unfinished, target)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            with contextlib.suppress(OSError):  # other processes may have put files there in the meantime
                for parent in made:
                    parent.rmdir()
            raise


def _remove_leftovers(directory: Path, prefix: str) -> None:
    if directory.is_dir():
        for path in directory.iterdir():
            pid = path.name.removeprefix(prefix)
            if path.name.startswith(prefix) and pid.isdigit() and not (psutil.pid_exists(int(pid)) and int(pid) != os.getpid()):
                shutil.rmtree(path)


def publish(unfinished: Path, target: Path) -> None:
    """Sync everything below `unfinished` to disk, then rename it. Raises OSError when `target` exists and is not empty."""
    sync_files(unfinished)
    os.rename(unfinished, target)
    sync(target.parent)


def remove_directory(directory: Path) -> None:
    """Remove a directory such that its name never refers to part of it."""
    doomed = directory.with_name(f"{directory.name}.unfinished-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(directory, doomed)
    shutil.rmtree(doomed)


def write_text(path: Path, text: str) -> None:
    """Replace a small text file atomically and sync it to disk."""
    beside = path.with_name(f".{path.name}.unfinished")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush the file or directory at `path` to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(top: Path) -> None:
    """Flush everything below `top` to disk."""
    for directory, _, names in os.walk(top):
        for name in names:
            sync(Path(directory, name))
        sync(Path(directory))


@contextmanager
def disk_errors(target: Path, outcome: str = "what stood there before still does") -> Iterator[None]:
    """Turn the file system's errors into a UserError with a cure; outcome: what became of `target`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{target} could not be written: {reason.lower()}; {outcome}; {_free_space(target)}") from error
        raise UserError(f"{target} could not be written ({reason}); {outcome}; choose another place") from error


def _free_space(target: Path) -> str:
    directory = next((p for p in target.parents if p.is_dir()), Path("/"))
    return f"{shutil.disk_usage(directory).free / 1e9:.2f} GB are free in {directory}: make room, or choose another place"
