"""Program: import torch, list its devices, and send bytes between two ranks of a gloo group. Prints one JSON object.

Argument: the address on which the group listens. Both ranks are threads of this process, which suffices to find a firewall or a wrong
interface, and needs only one import.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from megatron_aspo.common.errors import first_line

_GROUP_TIMEOUT_S = 10.0
_MEASURE_S = 0.2


def main() -> None:
    address = sys.argv[1]
    started = time.monotonic()
    import torch

    found = {"torch": torch.__version__, "cuda": torch.version.cuda or "", "seconds": time.monotonic() - started, "address": address}
    found |= _devices(torch)
    try:
        found |= {"gloo_bytes_per_s": _gloo(address), "gloo_error": ""}
    except Exception as error:
        found |= {"gloo_bytes_per_s": 0.0, "gloo_error": first_line(error)}
    print(json.dumps(found), flush=True)


def _devices(torch) -> dict:
    if not torch.version.cuda:
        return {"devices": [], "reason": ""}
    try:
        torch.cuda.init()
        return {"devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())], "reason": ""}
    except (RuntimeError, AssertionError) as error:
        return {"devices": [], "reason": " ".join(str(error).split())}


def _gloo(address: str) -> float:
    from megatron_aspo.common.network import reserved_port
    from megatron_aspo.doctor.link import measure_link

    with reserved_port(address) as port, ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(measure_link, address, port, rank, ("rank 0", "rank 1"), _MEASURE_S, _GROUP_TIMEOUT_S) for rank in (0, 1)]
        return min(end.result().bytes_per_s for end in ends)


if __name__ == "__main__":
    main()
