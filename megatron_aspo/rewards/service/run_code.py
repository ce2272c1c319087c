"""SandboxFusion's `/run_code`: one Python program, run once in a sandbox. SandboxFusion's documentation describes the fields."""

import time
from typing import Any

from megatron_aspo.common.errors import UserError
from megatron_aspo.rewards.sandbox.options import Limits
from megatron_aspo.rewards.sandbox.pool import SandboxPool
from megatron_aspo.rewards.sandbox.sandbox import SandboxError

_TYPES = {
    "code": str,
    "language": str,
    "stdin": str | None,
    "run_timeout": int | float,
    "compile_timeout": int | float,
    "files": dict,
    "fetch_files": list,
    "memory_limit_MB": int,
}


def run_code(request: dict[str, Any], sandboxes: SandboxPool, limits: Limits) -> dict[str, Any]:
    """Run a program and return the response's fields. `run_timeout` may shorten `limits.wall_s`, never lengthen it.

    Raises UserError for a request with unknown fields, wrong types, a language other than Python, or files.
    """
    _check(request, limits)
    if len(request["code"].encode("utf-8", "surrogatepass")) > 1 << 20:
        raise UserError("code has more than 1 MiB; shorten it")
    wall_s = min(limits.wall_s, float(request.get("run_timeout", limits.wall_s)))
    try:
        sandbox = sandboxes.take()
        try:
            sandbox.load({"program": request["code"]})
            started = time.monotonic()
            outcome = sandbox.run("stdin", (request.get("stdin") or "").encode("utf-8", "surrogatepass"), wall_s)
            seconds = time.monotonic() - started
        finally:
            sandbox.kill()
    except SandboxError as error:
        return {"status": "SandboxError", "message": str(error), "files": {}, "executor_pod_name": None}
    timed_out = outcome.ended in ("cpu", "wall")
    status = 0 if outcome.ended == "exit" and outcome.status == 0 else outcome.status or 1
    reason = "" if outcome.ended == "exit" else f"ended by its limit: {outcome.ended}"
    run = {
        "status": "TimeLimitExceeded" if timed_out else "Finished",
        "execution_time": seconds,
        "return_code": None if timed_out else status,
        "stdout": outcome.output.decode("utf-8", "replace"),
        "stderr": outcome.error or reason,
    }
    succeeded = not timed_out and status == 0
    message = "" if succeeded else reason
    return {
        "status": "Success" if succeeded else "Failed",
        "message": message,
        "compile_result": None,
        "run_result": run,
        "executor_pod_name": None,
        "files": {},
    }


def _check(request: dict[str, Any], limits: Limits) -> None:
    for name, value in request.items():
        if name not in _TYPES:
            raise UserError(f"{name} is no field of /run_code here; leave it out")
        if isinstance(value, bool) or not isinstance(value, _TYPES[name]):
            raise UserError(f"{name} is a {type(value).__name__}; correct its type")
    if "code" not in request or request.get("language") not in ("python", "python3"):
        raise UserError(f"language={request.get('language')} with code: only python is run here")
    if request.get("files") or request.get("fetch_files"):
        raise UserError("files are not taken here; put the data into code or stdin")
    if request.get("memory_limit_MB", limits.memory_mb) < limits.memory_mb:
        raise UserError(
            f"memory_limit_MB is below this server's {limits.memory_mb} (data.code.limits.memory_mb); leave it out, or lower that"
        )
    if not 0 < float(request.get("run_timeout", 1)) < 1e6:
        raise UserError("run_timeout must be above 0 s")
