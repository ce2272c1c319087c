"""A reward function of the user's own, by dotted path.

    def score(prompt: str, response: str, ground_truth, extra: dict) -> float | dict

`prompt` is the user's last message, or the whole prompt where it was a plain string; `extra` the row's other fields. A dict must have
`score`; its other entries, JSON values, go to the rollout dump; `reason` is shown beside the score.
"""

import copy
import importlib
import inspect
import json
import math
import numbers
import os
import sys
from typing import Any

from megatron_aspo.data.records import Prompt
from megatron_aspo.errors import UserError
from megatron_aspo.rewards.result import Reward, RewardResult

SIGNATURE = "(prompt, response, ground_truth, extra)"


def load_reward(path: str) -> Reward:
    """The function at `package.module:function`, made into a `Reward`; modules in the working directory are found too.

    Raises UserError if it cannot be imported or is not a plain function of four arguments; when called, if it raises or returns anything
    but a finite number or a dict with one, with the prompt's id in the message.
    """
    function = _import_function(path)
    if not callable(function):
        raise UserError(f"data.reward={path} is a {type(function).__name__}, expected a function {SIGNATURE}")
    if inspect.iscoroutinefunction(function):
        raise UserError(f"data.reward={path} is an async function, expected a plain one; drop the async")
    try:
        inspect.signature(function).bind("", "", None, {})
    except (TypeError, ValueError) as error:
        raise UserError(f"data.reward={path} cannot be called as {SIGNATURE} ({error}); change its parameters") from error

    def reward(prompt: Prompt, response: str) -> RewardResult:
        try:
            # Copied: the same prompt is scored again and again, whatever the function does to what it is given.
            value = function(prompt.text, response, copy.deepcopy(prompt.ground_truth), copy.deepcopy(prompt.extra))
        except Exception as error:
            raise UserError(f"data.reward={path} on prompt {prompt.id} raised {_one_line(error)}; correct the function") from error
        return _to_result(value, f"data.reward={path} on prompt {prompt.id}")

    return reward


def _import_function(path: str) -> Any:
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name or module_name.startswith("."):
        raise UserError(f"data.reward={path} is not of the form package.module:function")
    # Last, so that a file in the working directory never hides an installed package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code may raise anything
        raise UserError(f"data.reward={path}: importing {module_name} raised {_one_line(error)}; correct the path or the module") from error
    if not hasattr(module, function_name):
        raise UserError(f"data.reward={path}: {module_name} ({module.__file__}) has no {function_name}; correct the name")
    return getattr(module, function_name)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _to_result(value: Any, what: str) -> RewardResult:
    if not isinstance(value, dict):
        return RewardResult(_to_score(value, what), "scored by the user's function")
    if "score" not in value:
        raise UserError(f"{what} returned a dict without score (keys: {', '.join(map(str, value)) or 'none'}); add score")
    details = {key: entry for key, entry in value.items() if key not in ("score", "reason")}
    try:
        json.dumps(details)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} returned details that are not JSON values ({error}); return numbers, strings, lists and dicts") from error
    return RewardResult(_to_score(value["score"], what), str(value.get("reason", "scored by the user's function")), details)


def _to_score(value: Any, what: str) -> float:
    if not isinstance(value, numbers.Real):
        raise UserError(f"{what} returned a {type(value).__name__}, expected a number or a dict with score")
    if not math.isfinite(value):
        raise UserError(f"{what} returned {value}, expected a finite number")
    return float(value)
