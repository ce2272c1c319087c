"""Check of the connection between the first two GPUs of this machine, without Ray. As a program this module is one of the two ranks.

Arguments of the program: backend, address, port, rank, seconds, time limit of a transfer. It prints one JSON object.
"""

import json
import subprocess
import sys
import time

from megatron_aspo.common.network import reserved_port
from megatron_aspo.doctor.gpus import child_environment
from megatron_aspo.doctor.record import Record, failed, ok

_HOST = "127.0.0.1"
_SECONDS = 1.0
_CURE = (
    "set NCCL_DEBUG=INFO and run it again for NCCL's own reason; a common one is the access between GPUs (nvidia-smi topo -m; "
    "NCCL_P2P_DISABLE=1 goes round it, slowly) or shared memory that is too small"
)


def check_pair(limit_s: float, backend: str = "nccl") -> Record:
    """Send bytes between two processes, each with its own GPU, for about a second. backend: `nccl`; `gloo` needs no GPU."""
    with reserved_port(_HOST) as port:
        program = [sys.executable, "-m", "megatron_aspo.doctor.local_pair", backend, _HOST, str(port)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": child_environment(False)}
        deadline = time.monotonic() + limit_s
        ends = [subprocess.Popen([*program, str(rank), str(_SECONDS), str(limit_s / 3)], **pipes) for rank in (0, 1)]
        try:
            found = []
            for rank, end in enumerate(ends):
                out, error = end.communicate(timeout=max(0.1, deadline - time.monotonic()))
                if end.returncode:
                    lines = error.strip().splitlines()
                    return failed(backend, f"GPU {rank}: {lines[-1] if lines else f'status {end.returncode}'}", _CURE)
                found.append(json.loads(out.splitlines()[-1]))
        except subprocess.TimeoutExpired:
            return failed(backend, f"two GPUs of this machine do not connect within {limit_s:g} s", _CURE)
        finally:
            for end in ends:
                end.kill()
                end.wait()
    speeds = ", ".join(f"{end['bytes_per_s'] / 1e9:.1f} GB/s" for end in found)
    return ok(backend, f"GPU 0 and GPU 1 exchange {speeds}, round trip {found[0]['round_trip_s'] * 1000:.2f} ms")


def main() -> None:
    backend, address, port, rank, seconds, timeout_s = sys.argv[1:]
    import torch

    from megatron_aspo.doctor.link import measure_link

    if backend == "nccl":
        torch.cuda.set_device(int(rank))
    speed = measure_link(address, int(port), int(rank), ("GPU 0", "GPU 1"), float(seconds), float(timeout_s), backend)
    print(json.dumps(vars(speed)), flush=True)


if __name__ == "__main__":
    main()
