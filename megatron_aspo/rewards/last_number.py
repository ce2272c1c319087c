"""The reward of tasks whose answer is one integer."""

import re

from megatron_aspo.rewards.result import RewardResult

NUMBER = re.compile(r"(?<![0-9.])-?[0-9]+(?:\.[0-9]+)?")


def last_number(response: str, truth: int) -> RewardResult:
    """Score 1.0 if the last number in `response` is `truth` in plain decimal digits, else 0.0.

    Words, punctuation and a worked sum around it are allowed: "7", "7." and "3 + 4 = 7" are right; "07", "7.0" and "7 or 8" are not.
    Requiring the number alone would be simpler, but a small chat model then scores 0 on nearly every sample (SmolLM2-135M-Instruct on
    single_digit_addition: 0.00 against 0.19), and groups with equal rewards give no gradient.
    """
    number = find_last_number(response)
    if number is None:
        return RewardResult(0.0, "no number")
    if number != str(truth):
        return RewardResult(0.0, "another number", {"last_number": number})
    return RewardResult(1.0, "right", {"last_number": number})


def find_last_number(response: str) -> str | None:
    """Return the last number of a response as written, or None."""
    numbers = NUMBER.findall(response)
    return numbers[-1] if numbers else None
