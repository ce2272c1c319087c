"""Reward functions as a user would write them, right and wrong."""

import os
import re  # noqa: F401
import signal  # noqa: F401
import subprocess  # noqa: F401
import sys
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np

not_a_function = 3


class Hostile(float):
    """A number and a text whose conversions fail."""

    def __float__(self):
        sys.exit(1)

    def __str__(self):
        raise RuntimeError("no text")


class Own(BaseException):
    def __str__(self):
        raise RuntimeError("no text")


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def endless():
    value = []
    value.append(value)
    return value


def length(prompt, response, ground_truth, extra):
    return len(response)


def details(prompt, response, ground_truth, extra):
    return {"score": np.float32(0.5), "reason": "half", "seen": [prompt, response, ground_truth, extra]}


def process(prompt, response, ground_truth, extra):
    return {"score": 1, "pid": os.getpid()}


def greedy(prompt, response, ground_truth, extra):
    extra["changed"] = True
    return len(extra)


def three(prompt, response, ground_truth):
    return 0.0


async def waiting(prompt, response, ground_truth, extra):
    return 0.0


def raising(prompt, response, ground_truth, extra):
    raise KeyError("two\nlines")


def returned(prompt, response, ground_truth, extra):
    """Return the value of the row, an expression in Python."""
    return eval(ground_truth, VALUES)


def raised(prompt, response, ground_truth, extra):
    """Raise the exception of the row."""
    raise eval(ground_truth, VALUES)


def quitting(prompt, response, ground_truth, extra):
    quit()


VALUES = {kind.__name__: kind for kind in (Decimal, Fraction, Hostile, Own, nested, endless)} | {"np": np}


def does(prompt, response, ground_truth, extra):
    """Execute the response as Python; the score is the length of the response."""
    exec(response)
    return {"score": len(response), "pid": os.getpid(), "time": time.monotonic()}
