"""A runner of concurrent checks, each with a time limit."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from megatron_aspo.common.errors import UserError
from megatron_aspo.doctor.record import Record, broken, failed, refused

Check = Callable[[], Record]


def run_checks(checks: Mapping[str, Check], node: str, limit_s: float) -> Iterator[Record]:
    """Yield the record of each check as soon as it ends; after `limit_s` seconds, a failure for each that has not.

    A check that hangs, for example on an unresponsive network file system, remains in a daemon thread: the calling process has to end by
    `os._exit` or be killed.
    """
    done: queue.Queue[tuple[str, Record]] = queue.Queue()
    for name, check in checks.items():
        threading.Thread(target=lambda name=name, check=check: done.put((name, _result(name, check))), daemon=True).start()
    missing, deadline = dict.fromkeys(checks), time.monotonic() + limit_s
    while missing:
        try:
            name, record = done.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        missing.pop(name)
        yield replace(record, node=node)
    for name in missing:
        cure = "look for what it waits for, such as a file system that does not answer; --timeout gives a slow machine more time"
        yield replace(failed(name, f"no answer within {limit_s:g} s", cure), node=node)


def _result(name: str, check: Check) -> Record:
    try:
        return check()
    except UserError as error:
        return refused(name, error)
    except BaseException as error:
        return broken(name, error)
