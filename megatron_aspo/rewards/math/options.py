"""Options of the math reward."""

from typing import Annotated

from megatron_aspo.common.options import Choice, NonNegative, Positive, Rule, options


@options("data.math")
class MathOptions:
    """Options of `data.reward: math`."""

    extract: Annotated[str, Choice("boxed", "boxed_or_number", "number")] = "boxed"
    """Where the answer is: `boxed`, in the last complete `\\boxed{}`; `boxed_or_number`, there or else the last number of the response;
    `number`, the last number. Only the text after the last `</think>` is read."""
    limit_s: Positive[float] = 5.0
    """Longest time for one comparison by math-verify, in seconds. It is used only for notations that the exact comparison cannot read, in a
    process that is killed at the limit; the answer then counts as wrong."""
    rounded_digits: Annotated[NonNegative[int], Rule("must be 0, for exact values alone, or more; raise it")] = 6
    """A decimal with at least this many significant digits also equals the number of which it is the rounded or truncated value: 0.333333
    equals 1/3. 0: a decimal equals only its exact value."""
