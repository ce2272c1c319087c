"""`megatron-aspo doctor`: starts the work in a child process, kills it when it hangs, prints the results."""

import argparse
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.import_path import child_python_path
from megatron_aspo.doctor.record import Record, failed
from megatron_aspo.doctor.table import as_json, format_table, sort_records
from megatron_aspo.doctor.worker import GRACE_S, INTERRUPTS, Request

DEFAULT_BANDWIDTH_S = 1.0
_START_S = 60.0
"""Seconds for the child process to import its modules."""
_END_S = 10.0
_TAIL_BYTES = 4096


def run_doctor(parsed: argparse.Namespace) -> int:
    """Print the table, or one JSON object. Return 1 if a check failed, else 0. Raises UserError for misuse."""
    request = _request(parsed)
    started = time.monotonic()
    records = []
    for record in examine(request):
        records.append(record)
        if sys.stderr.isatty():
            print(f"\r\033[K{len(records)} checks done", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    records = sort_records(records)
    if parsed.json:
        print(json.dumps(as_json(records, time.monotonic() - started), indent=1, ensure_ascii=False))
    else:
        print("\n".join(format_table(records)))
    return 1 if any(record.status == "failed" for record in records) else 0


def _request(parsed: argparse.Namespace) -> Request:
    if parsed.bandwidth is not None and not parsed.ray_address:
        raise UserError("--bandwidth measures between nodes of a Ray cluster; name the cluster by --ray-address HOST:PORT, or leave it out")
    host, _, port = parsed.ray_address.rpartition(":")
    if parsed.ray_address and not (host and port.isdigit() and 0 < int(port) < 1 << 16):
        raise UserError(f"--ray-address {parsed.ray_address} is not HOST:PORT; give the address of the head node, such as 10.0.0.1:6379")
    for name, value in (("timeout", parsed.timeout), ("bandwidth", parsed.bandwidth)):
        if (value is not None and not (value > 0 or (name == "bandwidth" and value == 0))) or value == float("inf"):
            raise UserError(f"--{name} {value:g} must be a finite number of seconds above 0")
    if parsed.recipe or parsed.overrides:
        from megatron_aspo.config import load_optional

        load_optional(parsed.recipe, parsed.overrides)
    bandwidth_s = DEFAULT_BANDWIDTH_S if parsed.bandwidth is None else parsed.bandwidth
    recipe = str(parsed.recipe.absolute()) if parsed.recipe else ""
    return Request(recipe, parsed.overrides, parsed.ray_address, bandwidth_s, parsed.timeout, parsed.json)


def examine(request: Request) -> Iterator[Record]:
    """Yield the records as the child process writes them, and, if it hangs or dies, a failure that names the phase."""
    environment = os.environ | {"PYTHONPATH": child_python_path()}
    command = [sys.executable, "-m", "megatron_aspo.doctor.worker"]
    with contextlib.ExitStack() as stack:
        # An interrupt during Popen would leave an unknown process behind.
        with _defer_interrupts():
            child = stack.enter_context(
                subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            )
            stack.callback(child.kill)
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None  # pipes
        child.stdin.write(json.dumps(vars(request)).encode())
        child.stdin.close()
        yield from _read(child, child.stdout, child.stderr)


@contextlib.contextmanager
def _defer_interrupts() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM at the end of the block. A process that is started inside must unblock them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _read(child: subprocess.Popen, output: IO[bytes], errors: IO[bytes]) -> Iterator[Record]:
    phase, limit_s, tail, received = "starting", _START_S, b"", b""
    deadline = time.monotonic() + limit_s + GRACE_S
    with selectors.DefaultSelector() as selector:
        for pipe in (output, errors):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ)
        while True:
            events = selector.select(max(0.0, deadline - time.monotonic()))
            if not events:
                cure = "run it again with a larger --timeout; if it hangs there again, look at the node or service that the phase names"
                yield failed("doctor", f"hung while {phase}: no answer within {limit_s:g} s", cure)
                return
            for key, _ in events:
                data = os.read(key.fd, 1 << 16)
                if key.fileobj is errors:
                    tail = (tail + data)[-_TAIL_BYTES:]
                    if not data:
                        selector.unregister(errors)
                    continue
                if not data:
                    lines = tail.decode(errors="replace").strip().splitlines()
                    detail = f"its process ended while {phase}: {lines[-1] if lines else 'without a word'}"
                    yield failed("doctor", detail, "report this, with the output of megatron-aspo doctor --json")
                    return
                *lines, received = (received + data).split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    if "done" in message:
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            child.wait(_END_S)
                        return
                    if "record" in message:
                        yield Record(**message["record"])
                    else:
                        phase, limit_s = message["phase"], message["limit_s"]
                        deadline = time.monotonic() + limit_s + GRACE_S
