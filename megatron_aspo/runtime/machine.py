"""Checks this machine before a run starts processes on it: socket paths, Ray's token, shared memory and the run directory.

Ray and vLLM would fail too, but later, and without naming a cure. The limits are those of Ray 2.60 and vLLM 0.32.
"""

import os
import shutil
import tempfile
from pathlib import Path

from megatron_aspo.common.errors import UserError
from megatron_aspo.rollout.engine_layout import EngineSizes

_SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket."""
_RAY_SOCKET = "ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
_VLLM_SOCKET = "00000000-0000-0000-0000-000000000000"
SHARED = Path("/dev/shm")
_SHARED_BYTES = 160 << 20
"""Shared memory that an engine of several workers uses for the messages between them."""


def check_machine(engines: EngineSizes) -> None:
    """Raise UserError naming what is missing and the cure."""
    check_temporary()
    check_home()
    check_shared_memory(engines)


def check_can_be_made(directory: Path) -> None:
    """Raise UserError if the run directory, which does not exist yet, cannot be made later."""
    if problem := unwritable(next(parent for parent in directory.parents if parent.exists())):
        raise UserError(f"run directory {directory} cannot be made: {problem}; choose another run_dir")


def check_temporary() -> None:
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "")
    ray, vllm = Path(os.environ[variable] if variable else "/tmp"), Path(tempfile.gettempdir())
    given = f"{variable}={ray}" if variable else f"the temporary directory {ray}"
    _check_length(given, ray, "Ray", _RAY_SOCKET.format(pid=os.getpid()), "RAY_TMPDIR")
    _check_length(f"TMPDIR={vllm}", vllm, "vLLM", _VLLM_SOCKET, "TMPDIR")
    if problem := unwritable(ray / "ray"):
        raise UserError(f"{given}: Ray cannot write there ({problem}); set RAY_TMPDIR to a directory that can be written, such as /tmp")


def _check_length(given: str, directory: Path, program: str, socket: str, cure: str) -> None:
    if (room := _SOCKET_PATH_BYTES - len(socket) - 1) < len(os.fsencode(directory)):
        raise UserError(
            f"{given} is too long: the paths of {program}'s sockets in it would exceed {_SOCKET_PATH_BYTES} bytes, the system's limit; set "
            f"{cure} to a directory whose path has at most {room} bytes, such as /tmp"
        )


def check_home() -> None:
    """Raise UserError if Ray needs a token file in the home directory and cannot write it."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    cure = "set HOME to a directory that can be written"
    try:
        token = Path.home() / ".ray" / "auth_token"
    except RuntimeError as error:
        raise UserError(f"this user has no home directory, in which Ray keeps its token; {cure}") from error
    if not os.access(token, os.R_OK) and (problem := unwritable(token.parent)):
        raise UserError(f"HOME={token.parents[1]}: Ray cannot write its token {token} ({problem}); {cure}")


def check_shared_memory(engines: EngineSizes) -> None:
    cure = "give it room, in Docker by --shm-size=1g or --ipc=host"
    if problem := unwritable(SHARED):
        raise UserError(f"{SHARED} cannot be written ({problem}), and engines keep semaphores and messages there; {cure}")
    needed = _SHARED_BYTES * engines.engines if engines.tensor > 1 else 0
    if (room := shutil.disk_usage(SHARED).free) < needed:
        raise UserError(
            f"{SHARED} has {room >> 20} MiB free, and the workers of {engines.engines} engines exchange messages through "
            f"{needed >> 20} MiB of it; {cure}, or set rollout.tensor_parallel=1"
        )


def unwritable(directory: Path) -> str:
    """Return why no file can be made in the directory, or "". Makes the directory if it is missing."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"1")
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return ""
