"""A custom reward that misbehaves in a different way on every second response; the others get 1. A test copies it to a user's directory."""

import asyncio
import ctypes
import hashlib
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np

LEFT_BEHIND = "86.4201"
"""Seconds that a left-behind process sleeps; the test finds it by this number."""
kept = []


def ignore_signals():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(99)


def raise_(error):
    raise error


def leak():
    while True:
        kept.append(bytearray(64 << 20))


def start_process():
    subprocess.Popen(["sleep", LEFT_BEHIND], start_new_session=True)
    return 0.5


def start_thread():
    threading.Thread(target=time.sleep, args=(99,), daemon=False).start()
    return 0.5


def print_much():
    print("x" * 5_000_000, file=sys.stderr)
    print("y" * 5_000_000)
    return 0.5


def change_what_is_global():
    os.chdir("/")
    os.environ.clear()
    np.random.seed(0)
    sys.setrecursionlimit(200)
    return 0.5


def recurse():
    return recurse()


async def late():
    await asyncio.sleep(0)
    return 0.5


MISBEHAVIOUR = {
    "sleeps for ever": (lambda: time.sleep(999), "timeout", "timed out after 2 s"),
    "hangs in C code": (lambda: re.match(r"(a+)+$", "a" * 40 + "b"), "timeout", "timed out after 2 s"),
    "ignores signals": (ignore_signals, "timeout", "timed out after 2 s"),
    "stops itself": (lambda: os.kill(os.getpid(), signal.SIGSTOP), "timeout", "timed out after 2 s"),
    "raises": (lambda: raise_(ValueError("bad")), "error", "raised ValueError: bad; correct the function"),
    "exits": (lambda: sys.exit(0), "error", "raised SystemExit: 0; a reward must not exit: correct the function"),
    "interrupts": (lambda: raise_(KeyboardInterrupt()), "error", "raised KeyboardInterrupt; correct the function"),
    "recurses": (recurse, "error", "raised RecursionError"),
    "returns None": (lambda: None, "error", "returned a NoneType, expected a number"),
    "returns NaN": (lambda: float("nan"), "error", "returned nan, expected a finite number"),
    "returns infinity": (lambda: np.float64("inf"), "error", "returned inf, expected a finite number"),
    "returns text": (lambda: "1.0", "error", "returned a str, expected a number"),
    "returns a complex number": (lambda: 1j, "error", "returned a complex, expected a number"),
    "returns a huge integer": (lambda: 10**400, "error", "returned a int too large for a float"),
    "returns a coroutine": (late, "error", "returned a coroutine, expected a number"),
    "returns no score": (lambda: {"reward": 1.0}, "error", "returned a dict without score (keys: reward); add score"),
    "returns an object": (lambda: {"score": 1.0, "why": object()}, "error", "returned details that are not JSON values (why is a object)"),
    "returns a numpy scalar": (lambda: np.float32(0.5), "", "scored by the user's function"),
    "leaks memory": (leak, "crash", "got no more memory twice"),
    "ends its process": (lambda: os._exit(0), "crash", "ended its process (exit status 0) twice"),
    "crashes": (lambda: ctypes.string_at(0), "crash", "crashed its process (Segmentation fault) twice"),
    "closes its connection": (lambda: os.closerange(3, 65536), "crash", "crashed its process (Killed) twice"),
    "returns too much": (lambda: {"score": 1.0, "text": "x" * (17 << 20)}, "crash", "returned details of over 16 MiB twice"),
    "leaves a process behind": (start_process, "", "scored by the user's function"),
    "leaves a thread behind": (start_thread, "", "scored by the user's function"),
    "prints much": (print_much, "", "scored by the user's function"),
    "changes what is global": (change_what_is_global, "", "scored by the user's function"),
}
"""Name → (action, failure, start of the reason)."""
PLACE = os.getcwd()


def score(prompt, response, ground_truth, extra):
    key = hashlib.sha256((prompt + response).encode()).hexdigest()
    for number in itertools.count():
        try:
            with open(f"{PLACE}/seen_{number}", "x") as file:
                file.write(key)
            break
        except FileExistsError:
            with open(f"{PLACE}/seen_{number}") as file:
                if file.read() == key:  # the second attempt at it
                    break
    names = [*MISBEHAVIOUR]
    if number % 2 or number // 2 >= len(names):
        return 1.0
    return MISBEHAVIOUR[names[number // 2]][0]()
