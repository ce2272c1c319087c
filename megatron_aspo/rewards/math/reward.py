"""The reward of mathematics problems with a final answer: right or wrong."""

import math
import re
from typing import Any

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards.math.extract import extract_answer, last_boxed
from megatron_aspo.rewards.math.forked import math_verify_equal
from megatron_aspo.rewards.math.notation import clean
from megatron_aspo.rewards.math.options import MathOptions
from megatron_aspo.rewards.math.tree import Unreadable
from megatron_aspo.rewards.math.verdict import is_words, readings_of, verdict
from megatron_aspo.rewards.result import RewardResult

_SHOWN = 200
"""Characters of an answer in the rollout dump."""
_TEXT = re.compile(r"\\(?:text|textrm|textbf|textit|mbox)\s*\{[^{}]*[A-Za-z][^{}]*\}")
"""A ground truth with words in it may be compared only as text."""
_CURE = "correct the row, or leave it out"


class MathReward:
    """A `Reward`: 1.0 if the answer in the response equals the row's ground truth, or one of its list, else `wrong_score`."""

    def __init__(self, options: MathOptions, wrong_score: float = 0.0):
        """Raises UserError for options out of their bounds."""
        self._options, self._wrong_score = options, wrong_score

    def __call__(self, prompt: Prompt, response: str) -> RewardResult:
        """Score a response. Raises UserError, naming the prompt, for a ground truth that is not an answer."""
        try:
            golds = read_golds(prompt.ground_truth)
        except UserError as error:
            raise UserError(f"data.reward=math on prompt {prompt.id}: {error}") from error
        answer = extract_answer(response, self._options.extract)
        if answer is None:
            return RewardResult(self._wrong_score, "no answer in the response", {"verdict": "no answer"})
        for gold in golds:
            given = verdict(answer, gold, self._options)
            if given.correct:
                break
        score = 1.0 if given.correct else self._wrong_score
        return RewardResult(score, given.reason, {"verdict": "right" if given.correct else "wrong", "answer": _printable(answer)})


def read_golds(ground_truth: Any) -> list[str]:
    """Return the right answers of a row, any of which suffices. Raises UserError for anything but texts, numbers and lists of them."""
    values = ground_truth if isinstance(ground_truth, list) else [ground_truth]
    golds = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"ground_truth is a {type(value).__name__}, expected an answer as text or number, or a list of them; {_CURE}")
        boxed = last_boxed(value) if isinstance(value, str) else None
        golds.append(str(value) if boxed is None else boxed)
    if not golds:
        raise UserError(f"ground_truth is an empty list; {_CURE}")
    return golds


def check_ground_truth(ground_truth: Any, prompt: str = "") -> None:
    """Raise UserError if the ground truth is empty, or an unreadable formula, which an answer could only equal as text."""
    for gold in read_golds(ground_truth):
        text = clean(gold)
        shown = gold if len(gold) <= _SHOWN else f"{gold[:_SHOWN]}…"
        if not text:
            raise UserError(f"ground_truth {shown!r} is empty; {_CURE}")
        if is_words(text) or _TEXT.search(text):
            continue
        try:
            readings_of(text)
        except Unreadable as error:
            if not error.known_elsewhere or not math_verify_equal(text, text, MathOptions().limit_s)[0]:
                raise UserError(f"ground_truth {shown!r} is no answer that can be read ({error}); {_CURE}") from error


def _printable(answer: str) -> str:
    return answer[:_SHOWN].encode("utf-8", "replace").decode()
