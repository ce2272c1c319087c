"""A reward function of the user's own, by dotted path.

    def score(prompt: str, response: str, ground_truth, extra: dict) -> float | dict

`prompt` is the user's last message, or the whole prompt where it was a plain string; `extra` the row's other fields. A dict must have
`score`; its other entries, JSON values, go to the rollout dump; `reason` is shown beside the score.
"""

import copy
import json
import math
import numbers
from typing import Any

from megatron_aspo.data.records import Prompt
from megatron_aspo.dotted import check_call, load_function, one_line
from megatron_aspo.errors import UserError
from megatron_aspo.rewards.result import Reward, RewardResult

SIGNATURE = "(prompt, response, ground_truth, extra)"


def load_reward(path: str) -> Reward:
    """The function at `package.module:function`, made into a `Reward`; modules in the working directory are found too.

    Raises UserError if it cannot be imported or is not a plain function of four arguments; when called, if it raises or returns anything
    but a finite number or a dict with one, with the prompt's id in the message.
    """
    function = load_function(path, "data.reward")
    check_call(function, path, "data.reward", SIGNATURE, "", "", None, {})

    def reward(prompt: Prompt, response: str) -> RewardResult:
        try:
            # Copied: the same prompt is scored again and again, whatever the function does to what it is given.
            value = function(prompt.text, response, copy.deepcopy(prompt.ground_truth), copy.deepcopy(prompt.extra))
        except Exception as error:
            raise UserError(f"data.reward={path} on prompt {prompt.id} raised {one_line(error)}; correct the function") from error
        return _to_result(value, f"data.reward={path} on prompt {prompt.id}")

    return reward


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
