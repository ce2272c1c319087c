"""Defaults of an evaluation that depend on the machine: the engines' key-value cache, and the number of reward workers."""

import os
import shutil
import subprocess

import psutil

from megatron_aspo.hf.model import HFModel
from megatron_aspo.rollout.memory import check_cache, choose_cache
from megatron_aspo.rollout.options import RolloutOptions

_SHARE = 0.9
"""Share of the free memory that engines may plan with; the rest is for the memory of their programs."""
_WORKER_BYTES = 3 << 29
"""Memory of one reward worker: 0.5 GiB for its processes, 1 GiB for the program that it runs (`data.code.limits.memory_mb`)."""
_NVIDIA_SMI_S = 30.0


def reward_workers() -> int:
    """Return one reward worker for each core that this process may use, or as many as the free memory has room for."""
    return max(1, min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // _WORKER_BYTES))


def with_cache(model: HFModel, options: RolloutOptions, given: bool, max_model_len: int, device: str, here: bool) -> RolloutOptions:
    """Return the options with a key-value cache: theirs, checked, or one that is chosen.

    given: whether the options' cache is to be kept. device: `cpu | cuda`. here: whether the engines run on this machine, whose memory then
    limits the choice. Raises UserError for a cache that cannot hold one response of full length, and for a machine without room for it.
    """
    if not given:
        room = _room(device, options.sizes.world) if here else None
        options = choose_cache(model, options, max_model_len, room, on_cpu=device == "cpu")
    check_cache(model, options, max_model_len, "engine.")
    return options


def _room(device: str, workers: int) -> int | None:
    """Return the bytes of memory for one of the workers of all engines; None if nvidia-smi does not report it."""
    if device == "cpu":
        return int(psutil.virtual_memory().available * _SHARE) // workers
    free = free_gpu_bytes()
    return int(free * _SHARE) if free else None


def free_gpu_bytes() -> int:
    """Return the least free memory of any GPU of this machine; 0 if nvidia-smi does not report it. This process does not load CUDA."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    command = [program, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_S, check=True)
        return min(map(int, done.stdout.split()), default=0) << 20
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0
