"""Checks of the directories that a run writes: run directory, temporary files, shared memory, and the Hugging Face hub's cache."""

import os
import shutil
import tempfile
from pathlib import Path

from megatron_aspo.common.errors import UserError
from megatron_aspo.doctor.needs import RunNeeds
from megatron_aspo.doctor.record import Record, failed, ok, refused, warning
from megatron_aspo.runtime.machine import SHARED, check_home, check_shared_memory, check_temporary, unwritable

GIB = 1 << 30
_LEAST, _GOOD = 1 * GIB, 10 * GIB
"""Free bytes of a disk below which a check fails or warns, unless the recipe determines how much the run will write."""
_RAY_FULL = 0.05
"""Ray 2.60 spills no objects to a disk with less than this share free (`local_fs_capacity_threshold`)."""
_SHARED_LEAST, _SHARED_GOOD = 256 << 20, 1 * GIB
"""Free shared memory: Ray's own object store takes 512 MiB of it, an engine of several workers 160 MiB. Docker's default is 64 MiB."""


def check_run_directory(needs: RunNeeds) -> Record:
    directory = existing_parent(needs.directory)
    if problem := unwritable(directory):
        return failed("run directory", f"{needs.directory} cannot be written: {problem}", "choose another run_dir, or correct its rights")
    needed = needs.disk_bytes or _GOOD
    free = shutil.disk_usage(directory).free
    planned = f"; the run will write about {in_gib(needed)}" if needs.disk_bytes else ""
    detail = f"{in_gib(free)} free in {directory}{planned}"
    if free >= needed:
        return ok("run directory", detail)
    least = needs.disk_bytes or _LEAST
    return (failed if free < least else warning)("run directory", detail, "make room, choose another run_dir, or keep fewer checkpoints")


def check_temporary_directory() -> Record:
    """Check the space for Ray's and vLLM's sockets, Ray's logs, and objects spilled from shared memory."""
    try:
        check_temporary()
    except UserError as error:
        return refused("temporary files", error)
    ray = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    worst: list[tuple[int, str, str]] = []
    found, cure = [], "make room, or set RAY_TMPDIR and TMPDIR to directories of a larger disk"
    for directory in dict.fromkeys((ray, Path(tempfile.gettempdir()))):
        if problem := unwritable(directory):
            return failed("temporary files", f"{directory} cannot be written: {problem}", "set TMPDIR to a directory that can be")
        disk = shutil.disk_usage(directory)
        detail = f"{in_gib(disk.free)} of {in_gib(disk.total)} free in {directory}"
        found.append(detail)
        if disk.free < _LEAST or (directory == ray and disk.free < _RAY_FULL * disk.total):
            worst.append(
                (2, detail, f"make room; Ray needs {_RAY_FULL:.0%} of the disk free: or set RAY_TMPDIR and TMPDIR to a larger disk")
            )
        elif disk.free < _GOOD:
            worst.append((1, detail, "make room, or set RAY_TMPDIR and TMPDIR to a larger disk"))
    if not worst:
        return ok("temporary files", ", ".join(found))
    degree, detail, cure = max(worst)
    return (failed if degree == 2 else warning)("temporary files", detail, cure)


def check_shared(needs: RunNeeds) -> Record:
    """Check the shared memory of this machine or container."""
    try:
        check_shared_memory(needs.engines)
    except UserError as error:
        return refused("shared memory", error)
    disk = shutil.disk_usage(SHARED)
    detail = f"{in_gib(disk.free)} of {in_gib(disk.total)} free in {SHARED}"
    if disk.free >= _SHARED_GOOD:
        return ok("shared memory", detail)
    return (failed if disk.free < _SHARED_LEAST else warning)(
        "shared memory", detail, "give it room, in Docker by --shm-size=8g or --ipc=host, in Kubernetes by an emptyDir with medium: Memory"
    )


def check_ray_token(in_ray: bool) -> Record:
    """Check that Ray's processes authenticate by a token. in_ray: whether this process already belongs to a cluster."""
    if not in_ray:
        check_home()
        return ok("Ray token", "can be read or made")
    from ray._raylet import AuthenticationMode, get_authentication_mode  # pyright: ignore[reportAttributeAccessIssue]  its stub lacks them

    if get_authentication_mode() == AuthenticationMode.TOKEN:
        return ok("Ray token", "required by this node's servers")
    cure = "stop Ray, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH on every node, and start it again; see SECURITY.md"
    return warning("Ray token", "not required: whoever reaches the ports of this node's Ray can run programs on it", cure)


def check_hub_cache(needs: RunNeeds) -> Record:
    """Check that models and data sets of the Hugging Face hub can be stored."""
    from huggingface_hub.constants import HF_HUB_CACHE

    directory = Path(HF_HUB_CACHE)
    if problem := unwritable(existing_parent(directory)):
        wanted = any(not Path(name).is_absolute() for name in (needs.model, *needs.data) if name)
        return (failed if wanted else warning)(
            "hub cache", f"{directory} cannot be written: {problem}", "set HF_HOME to a directory that can be written"
        )
    return ok("hub cache", f"{in_gib(shutil.disk_usage(existing_parent(directory)).free)} free for {directory}")


def existing_parent(path: Path) -> Path:
    """Return the path itself, or its nearest existing parent."""
    return next(parent for parent in (path, *path.parents) if parent.exists())


def in_gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes >> 20} MiB"
