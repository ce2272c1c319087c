"""Checks of the GPUs and their driver, and of torch. This process loads neither CUDA nor torch."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_aspo.common.import_path import child_python_path
from megatron_aspo.doctor.needs import NodeContext
from megatron_aspo.doctor.record import Record, failed, ok, warning

_QUERY = ("name", "driver_version", "memory.total", "memory.used")
_BUSY_MIB = 2048
"""Memory use above which a GPU is assumed to be occupied; the driver itself takes a few hundred MiB."""
_DRIVER_CURE = "run nvidia-smi on the node: the driver is missing, of another version than its libraries, or hangs; reload it or reboot"


def gpu_devices(directory: Path = Path("/dev")) -> int:
    """Return the number of GPUs whose device files this machine or container has."""
    return len([path for path in directory.glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()])


def check_gpus(limit_s: float, devices: int | None = None) -> Record:
    """Check the GPUs by nvidia-smi. devices: number of device files; None counts them."""
    devices = gpu_devices() if devices is None else devices
    program = shutil.which("nvidia-smi")
    if program is None:
        if devices:
            return failed("GPUs", f"{devices} device files, but there is no nvidia-smi on PATH", _DRIVER_CURE)
        return ok("GPUs", "none: trainers and engines compute on the CPU")
    command = [program, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        why = f"no answer within {limit_s:g} s" if isinstance(error, subprocess.TimeoutExpired) else error
        return failed("GPUs", f"nvidia-smi: {why}", _DRIVER_CURE)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        return failed("GPUs", f"nvidia-smi: {lines[0] if lines else f'status {done.returncode}'}", _DRIVER_CURE)
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return _judge([row for row in rows if len(row) == len(_QUERY)])


def _judge(rows: list[list[str]]) -> Record:
    if not rows:
        return failed("GPUs", "nvidia-smi lists none", _DRIVER_CURE)
    names = sorted({name for name, *_ in rows})
    drivers = sorted({driver for _, driver, *_ in rows})
    detail = f"{len(rows)} × {' and '.join(names)}, {_number(rows[0][2]) >> 10} GiB each, driver {drivers[0]}"
    facts = {"NVIDIA driver": drivers[0], "kind of GPU": names[0], "number of GPUs": str(len(rows))}
    busy = [f"GPU {index}: {used} MiB" for index, (*_, used) in enumerate(rows) if _number(used) > _BUSY_MIB]
    if busy:
        cure = "end what computes there (nvidia-smi lists the processes), or start Ray with the other GPUs (CUDA_VISIBLE_DEVICES)"
        return warning("GPUs", f"{detail}; in use already: {', '.join(busy)}", cure, facts)
    return ok("GPUs", detail, facts)


def _number(text: str) -> int:
    """Parse a number of nvidia-smi, which writes `[N/A]` for values that a GPU does not report."""
    return int(text) if text.isdigit() else 0


def check_torch(context: NodeContext, limit_s: float) -> Record:
    """Import torch in a separate process, which lists its devices and sends bytes through a gloo group on this machine."""
    program = [sys.executable, "-m", "megatron_aspo.doctor.torch_trial", context.address]
    try:
        done = subprocess.run(program, capture_output=True, text=True, timeout=limit_s, env=child_environment(context.in_ray), check=False)
    except subprocess.TimeoutExpired:
        return failed("torch", f"import and a gloo group take longer than {limit_s:g} s", "look for a slow file system or a busy machine")
    with contextlib.suppress(ValueError, IndexError):
        return judge_torch(json.loads(done.stdout.splitlines()[-1]), gpu_devices())
    lines = done.stderr.strip().splitlines()
    return failed("torch", f"{lines[-1] if lines else f'status {done.returncode}'}", "install torch again, at the version that is required")


def judge_torch(found: dict, devices: int) -> Record:
    """Return the record of torch_trial's output `found`, on a machine with `devices` GPUs."""
    facts = {"CUDA of torch": found["cuda"] or "none"}
    kind = f"CUDA {found['cuda']}" if found["cuda"] else "without CUDA"
    usable = len(found["devices"])
    detail = f"{found['torch']} ({kind}), {usable} GPUs, imported in {found['seconds']:.1f} s"
    if devices and not found["cuda"]:
        cure = "install torch for CUDA: pip install 'megatron_aspo[gpu]'"
        return failed("torch", f"{detail}, but this machine has {devices}", cure, facts)
    if devices and not usable:
        cure = "take a driver that is new enough for this CUDA, or correct CUDA_VISIBLE_DEVICES"
        return failed("torch", f"{detail}: {found['reason'] or 'no reason given'}", cure, facts)
    if found["gloo_error"]:
        return failed(
            "torch",
            f"{detail}; gloo on {found['address']}: {found['gloo_error']}",
            "allow TCP on this address (firewall), and see that GLOO_SOCKET_IFNAME, if set, names its interface",
            facts,
        )
    detail += f", gloo on {found['address']} at {found['gloo_bytes_per_s'] / 1e9:.1f} GB/s"
    if usable < devices:
        return warning("torch", f"{detail}; {devices - usable} GPUs are hidden", "correct CUDA_VISIBLE_DEVICES if that is not meant", facts)
    return ok("torch", detail, facts)


def child_environment(in_ray: bool) -> dict[str, str]:
    """Return the environment of a Python process that imports this package, with the GPUs that Ray hides from workers without one."""
    environment = dict(os.environ)
    if in_ray:
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    return environment | {"PYTHONPATH": child_python_path()}
