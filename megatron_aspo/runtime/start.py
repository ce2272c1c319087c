"""The start of a run, from nothing or from a verified checkpoint, and the ownership of its directory."""

import fcntl
import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_aspo.checkpoint.find import find_checkpoints
from megatron_aspo.checkpoint.manifest import Manifest, is_checkpoint, open_manifest, read_manifest
from megatron_aspo.checkpoint.request import ATTEMPT
from megatron_aspo.common.atomic import disk_errors, write_text
from megatron_aspo.common.errors import UserError
from megatron_aspo.config import Config
from megatron_aspo.runtime.ledger import made_checkpoints, origin


@dataclass(frozen=True)
class Start:
    """The start of a run: a new run, or a checkpoint."""

    in_place: bool
    """Whether the run continues in its existing directory."""
    checkpoint: Path | None = None
    manifest: Manifest | None = None
    """The checkpoint's manifest; None without one."""

    @property
    def step(self) -> int:
        """The number of steps that are already done."""
        return self.training["step"] if self.manifest else 0

    @property
    def training(self) -> dict[str, Any]:
        """The state, beside tensors, from which the run resumes; empty for a new run."""
        return self.manifest.training if self.manifest else {}


def find_start(config: Config, damage: bool = True) -> Start:
    """Return the start that `resume` chooses: `never`, `auto`, or the path of a checkpoint or a run. Changes nothing.

    Raises UserError when the run directory must not exist, when there is nothing to resume from, and when the checkpoint is damaged; then
    it names the previous one. damage: whether to check for damage, which reads the whole checkpoint.
    """
    exists = directory_exists(config)
    if config.resume == "never":
        if exists:
            raise UserError(
                f"run directory {config.directory} exists; choose another name or run_dir, remove it, or go on with it by resume=auto"
            )
        return Start(in_place=False)
    if config.resume == "auto":
        if not exists:
            return Start(in_place=False)
        _check_ours(config.directory)
        # Before its first checkpoint, a run that branched from another's checkpoint starts there again.
        checkpoint = _newest(config.directory) or (Path(began) if (began := origin(config.directory / "ledger.jsonl")) else None)
        if checkpoint is None and made_checkpoints(config.directory / "ledger.jsonl"):
            raise UserError(
                f"{config.directory}: the ledger names checkpoints, but there is none; put them back, or begin under another name"
            )
        return Start(True, checkpoint, _read(checkpoint, damage)) if checkpoint else Start(True)
    checkpoint = _named(Path(config.resume).expanduser().absolute())
    in_place = checkpoint.parent.parent.resolve() == config.directory.resolve()
    if in_place and checkpoint not in find_checkpoints(checkpoint.parent.parent).values():
        raise UserError(f"{checkpoint} was set aside from its run; go on from it under another name")
    if exists and not in_place:
        raise UserError(f"run directory {config.directory} exists, and {checkpoint} is another run's; choose another name or run_dir")
    return Start(in_place, checkpoint, _read(checkpoint, damage))


def _named(path: Path) -> Path:
    """Return the checkpoint of resume=PATH; PATH is a checkpoint, or a run, whose newest checkpoint it is."""
    checkpoint = path if is_checkpoint(path) else _newest(path)
    if checkpoint is None:
        raise UserError(f"resume={path}: there is no checkpoint; name a directory such as runs/NAME/checkpoints/step_10")
    return checkpoint


def _newest(run_directory: Path) -> Path | None:
    return next(reversed(find_checkpoints(run_directory).values()), None)


def _read(checkpoint: Path, damage: bool) -> Manifest:
    try:
        manifest = read_manifest(checkpoint) if damage else open_manifest(checkpoint)[0]
    except UserError as error:
        earlier = [path for path in find_checkpoints(checkpoint.parent.parent).values() if _step(path) < _step(checkpoint)]
        cure = f"the one before it is {earlier[-1]}: go on from there with --resume {earlier[-1]}" if earlier else "there is none before it"
        raise UserError(f"{error}; {cure}") from error
    if not manifest.training:
        raise UserError(f"{checkpoint} holds weights alone, as a conversion makes it: convert it to Hugging Face and name it as the model")
    return manifest


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("step_")
    return int(number) if number.isdigit() else 0


def _check_ours(directory: Path) -> None:
    names = {path.name for path in directory.iterdir()}
    # A process that was killed while creating the directory left no more than this.
    if ATTEMPT not in names and not names <= {"lock", f".{ATTEMPT}.unfinished"}:
        raise UserError(f"{directory} is no run's directory (it has no file {ATTEMPT}): resume=auto cannot go on there; choose another")


def directory_exists(config: Config) -> bool:
    """Return whether the run directory exists. Raises UserError for a name or run_dir that is not a valid path."""
    try:
        if longest := max((part for part in config.directory.parts if len(part.encode()) > 255), default=""):
            raise OSError(f"a part of it has {len(longest.encode())} bytes, over the 255 that file systems take")
        return config.directory.exists()
    except (OSError, RuntimeError) as error:
        raise UserError(f"name={config.name} run_dir={config.run_dir} is no usable path: {error}; choose another") from error


class Ownership:
    """Ownership of the run directory, until this process ends for any reason. Raises UserError while another live process owns it."""

    def __init__(self, directory: Path):
        self.attempt = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        with disk_errors(directory):
            self._lock = (directory / "lock").open("a", encoding="utf-8")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = (directory / ATTEMPT).read_text(encoding="utf-8") if (directory / ATTEMPT).exists() else "another process"
                raise UserError(f"{directory} is in use by {owner}; wait until that run ends, or end it") from error
            write_text(directory / ATTEMPT, self.attempt)

    def close(self) -> None:
        self._lock.close()
