"""The reward of tasks whose answer is one integer."""

import re

from megatron_aspo.rewards.result import RewardResult

NUMBER = re.compile(r"(?<![0-9.])-?[0-9]+(?:\.[0-9]+)?")


def last_number(response: str, truth: int) -> RewardResult:
    """Score 1.0 if the last number in `response` is `truth` in plain decimal digits, else 0.0.

    Words, punctuation and a worked sum around it are allowed: "7", "7." and "3 + 4 = 7" are right; "07", "7.0" and "7 or 8" are not.
    To demand the number alone would be simpler, but a small chat model then scores 0 on nearly every sample (SmolLM2-135M-Instruct on
    single_digit_addition: 0.00 against 0.19), and groups whose rewards are all equal teach nothing.
    """
    numbers = NUMBER.findall(response)
    if not numbers:
        return RewardResult(0.0, "no number")
    if numbers[-1] != str(truth):
        return RewardResult(0.0, "another number", {"last_number": numbers[-1]})
    return RewardResult(1.0, "right", {"last_number": numbers[-1]})
