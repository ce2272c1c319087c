"""Reward functions as a user would write them, right and wrong."""

import os

import numpy as np

not_a_function = 3


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


def leaving(prompt, response, ground_truth, extra):
    os._exit(3)


def returned(prompt, response, ground_truth, extra):
    """Returns what the row says, in Python's notation."""
    return eval(ground_truth, {"np": np})
