"""A custom reward function, by import path.

    def score(prompt: str, response: str, ground_truth, extra: dict) -> float | dict

or the same as `async def`.
`prompt` is the user's last message, or the whole prompt if it was a plain string; `extra` the row's other fields. A dict must have
`score`; its other entries, JSON values, go to the rollout dump; `reason` is shown beside the score.
"""

import asyncio
import copy
import inspect
import json
import math
import numbers
from decimal import Decimal
from typing import Any

import numpy as np

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.import_path import check_call, load_function, one_line
from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards.result import Reward, RewardResult

SIGNATURE = "(prompt, response, ground_truth, extra)"
_NO_REASON = "scored by the user's function"
_MAX_DEPTH = 100
"""Maximum nesting of details. JSON readers have limits of this order, and a list that contains itself has no end."""


class RewardError(UserError):
    """A custom reward raised or returned no score; `data.reward_on_error` decides the consequence."""

    def __init__(self, what: str, fault: str):
        """what: the reward and the prompt; fault: the fault, as a verb phrase, and the cure."""
        super().__init__(f"{what} {fault}")
        self.fault = fault


class _NoScoreError(Exception):
    """A value is not a score; the text describes it."""


def load_reward(path: str) -> Reward:
    """Return the function at `package.module:function` as a `Reward`; modules in the working directory are found too.

    Raises UserError if it cannot be imported or is not a function of four arguments. The returned `Reward` raises RewardError, with the
    prompt's id in the message, if the function raises anything (SystemExit and KeyboardInterrupt included) or returns anything but a
    finite number or a dict with one; only a MemoryError passes, because it is no property of the response.
    """
    function = load_function(path, "data.reward", allow_async=True)
    loop = asyncio.new_event_loop() if inspect.iscoroutinefunction(function) else None
    check_call(function, path, "data.reward", SIGNATURE, "", "", None, {})

    def reward(prompt: Prompt, response: str) -> RewardResult:
        what = f"data.reward={path} on prompt {prompt.id}"
        try:
            # Copied, because the same prompt is scored repeatedly and the function may change its arguments.
            value = function(prompt.text, response, copy.deepcopy(prompt.ground_truth), copy.deepcopy(prompt.extra))
            if loop:
                value = loop.run_until_complete(value)
        except MemoryError:
            raise
        except BaseException as error:
            rule = "a reward must not exit: " if isinstance(error, SystemExit) else ""
            raise RewardError(what, f"raised {one_line(error)}; {rule}correct the function") from error
        try:
            return _to_result(value)
        except _NoScoreError as error:
            raise RewardError(what, f"returned {error}") from error.__cause__
        except BaseException as error:  # the value's own methods may raise anything
            kind = type(value).__name__
            raise RewardError(
                what, f"returned a {kind} that cannot be read ({one_line(error)}); return a number, or a dict with score"
            ) from error

    return reward


def _to_result(value: Any) -> RewardResult:
    if not isinstance(value, dict):
        return RewardResult(_to_score(value), _NO_REASON)
    if "score" not in value:
        raise _NoScoreError(f"a dict without score (keys: {', '.join(map(str, value)) or 'none'}); add score")
    score = _to_score(value["score"])
    details = {key: entry for key, entry in value.items() if key not in ("score", "reason")}
    try:
        reason = _to_json(str(value.get("reason", _NO_REASON)), "reason")
        return RewardResult(score, reason, _to_json(details, ""))
    except _NotJsonError as error:
        raise _NoScoreError(f"details that are not JSON values ({error}); return finite numbers, text, lists and dicts") from error


def _to_score(value: Any) -> float:
    if not isinstance(value, (numbers.Real, Decimal, np.bool_)):
        raise _NoScoreError(f"a {type(value).__name__}, expected a number or a dict with score")
    try:
        score = float(value)
    except OverflowError as error:
        raise _NoScoreError(f"a {type(value).__name__} too large for a float, expected a finite number") from error
    if not math.isfinite(score):
        raise _NoScoreError(f"{score}, expected a finite number")
    return score


class _NotJsonError(Exception):
    """A value that JSON cannot express; the text names it."""


def _to_json(value: Any, name: str, depth: int = 0) -> Any:
    """Return `value` with tuples converted to lists, dict keys to text and numpy's numbers to Python's.

    Raises _NotJsonError with the entry's name.
    """
    if depth > _MAX_DEPTH:
        raise _NotJsonError(f"{name[:40]}… is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        entries: dict[str, Any] = {}
        for key, entry in value.items():
            text = _to_key(key, name)
            if text in entries:
                raise _NotJsonError(f"{name or 'the dict'} has two keys that JSON writes as {text!r}")
            entries[text] = _to_json(entry, f"{name}.{text}" if name else text, depth + 1)
        return entries
    if isinstance(value, (list, tuple)):
        return [_to_json(entry, f"{name}[{i}]", depth + 1) for i, entry in enumerate(value)]
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _NotJsonError(f"{name} has half of a surrogate pair, \\ud800 to \\udfff") from error
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _NotJsonError(f"{name} is {value}")
    elif isinstance(value, int):
        try:
            json.dumps(value)
        except ValueError as error:
            raise _NotJsonError(f"{name} is an integer with too many digits") from error
    elif value is not None:
        raise _NotJsonError(f"{name} is a {type(value).__name__}")
    return value


def _to_key(key: Any, name: str) -> str:
    key = key.item() if isinstance(key, np.generic) else key
    if not (key is None or isinstance(key, (str, int, float))):
        raise _NotJsonError(f"{name or 'the dict'} has a key that is a {type(key).__name__}")
    return _to_json(key, f"a key of {name}" if name else "a key") if isinstance(key, str) else json.dumps(key)
