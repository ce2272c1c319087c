"""Program: the doctor's work, in a process that the command can kill when it hangs.

Reads one JSON object, the request, from standard input. Writes a JSON object on each line: `{"phase": …, "limit_s": …}` before each part of
the work, `{"record": …}` for each result, and `{"done": true}`.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron_aspo.common.errors import UserError
from megatron_aspo.config import Config, load_config
from megatron_aspo.doctor.needs import NodeContext, RunNeeds
from megatron_aspo.doctor.node import node_checks
from megatron_aspo.doctor.record import Record, broken, failed
from megatron_aspo.doctor.redact import redact
from megatron_aspo.doctor.runner import run_checks

GRACE_S = 5.0
"""Seconds beyond a phase's limit that the command waits for a message."""

INTERRUPTS = {signal.SIGINT, signal.SIGTERM}
"""Signals that the command blocks while it starts this program."""


@dataclass(frozen=True)
class Request:
    """The command's request to this program."""

    recipe: str
    """Path of a recipe, or empty."""
    overrides: list[str]
    ray_address: str
    bandwidth_s: float
    limit_s: float
    """Time limit of each check."""
    hide: bool
    """Whether the records are meant for an issue report."""


class Reporter:
    """Writes messages to the command."""

    def __init__(self, descriptor: int):
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")

    def phase(self, name: str, limit_s: float) -> None:
        # If the command is killed, this alarm is all that ends a hanging process.
        signal.alarm(int(limit_s + 2 * GRACE_S))
        self._write({"phase": name, "limit_s": limit_s})

    def add(self, record: Record) -> None:
        self._write({"record": vars(record)})

    def done(self) -> None:
        self._write({"done": True})

    def _write(self, message: dict) -> None:
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()


def main() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
    reporter = Reporter(os.dup(1))
    os.dup2(2, 1)  # output of libraries must not mix with messages
    request = Request(**json.load(sys.stdin))
    try:
        work(request, reporter)
    except BaseException as error:
        reporter.add(broken("doctor", error))
    reporter.done()
    # Threads of hanging checks would keep the process alive.
    os._exit(0)


def work(request: Request, reporter: Reporter) -> None:
    """Check this machine, or the cluster; send all results to the reporter."""
    config = load_config(Path(request.recipe), request.overrides) if request.recipe else None
    if config is None:
        needs = RunNeeds(Path("runs").absolute())
    else:
        from megatron_aspo.doctor.recipe import run_needs

        reporter.phase("reading the recipe's model", request.limit_s)
        needs = run_needs(config)
    add: Callable[[Record], None] = (lambda record: reporter.add(redact(record))) if request.hide else reporter.add
    if not request.ray_address:
        _check_machine(needs, config, request.limit_s, add, reporter)
        return
    from megatron_aspo.doctor.cluster import JOIN_CURE, ClusterDoctor

    try:
        doctor = ClusterDoctor(request.ray_address, needs, config, request.bandwidth_s, request.limit_s, request.hide, reporter.phase)
    except UserError as error:
        add(failed("Ray cluster", str(error), JOIN_CURE))
        _check_machine(needs, None, request.limit_s, add, reporter)
        return
    for record in doctor.examine():
        add(record)
    reporter.phase("leaving the cluster", GRACE_S)
    with contextlib.suppress(Exception):  # all results have been sent
        doctor.close()


def _check_machine(needs: RunNeeds, config: Config | None, limit_s: float, add: Callable[[Record], None], reporter: Reporter) -> None:
    context = NodeContext("this machine")
    reporter.phase("checking this machine", limit_s)
    checks = node_checks(needs, context, limit_s)
    if config is not None:
        from megatron_aspo.doctor.recipe import check_placement

        config = replace(config, ray_address="")
        checks["placement"] = partial(check_placement, config, "", [])
    for record in run_checks(checks, context.label, limit_s):
        add(record)


if __name__ == "__main__":
    main()
