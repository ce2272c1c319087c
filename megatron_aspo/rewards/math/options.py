"""Options of the math reward."""

from dataclasses import dataclass

from megatron_aspo.common.errors import UserError, nearest

EXTRACTS = ("boxed", "boxed_or_number", "number")


@dataclass(frozen=True)
class MathOptions:
    """Options of `data.reward: math`."""

    extract: str = "boxed"
    """Where the answer is: `boxed`, in the last complete `\\boxed{}`; `boxed_or_number`, there or else the last number of the response;
    `number`, the last number. Only the text after the last `</think>` is read."""
    limit_s: float = 5.0
    """Longest time for one comparison by math-verify, in seconds. It is used only for notations that the exact comparison cannot read, in a
    process that is killed at the limit; the answer then counts as wrong."""
    rounded_digits: int = 6
    """A decimal with at least this many significant digits also equals the number of which it is the rounded or truncated value: 0.333333
    equals 1/3. 0: a decimal equals only its exact value."""

    def check(self, prefix: str = "math.") -> None:
        """Raise UserError naming the first option that is out of bounds."""
        if self.extract not in EXTRACTS:
            raise UserError(f"{prefix}extract={self.extract} is not known; {nearest(self.extract, EXTRACTS)}")
        if self.limit_s <= 0:
            raise UserError(f"{prefix}limit_s={self.limit_s:g} must be above 0; raise it")
        if self.rounded_digits < 0:
            raise UserError(f"{prefix}rounded_digits={self.rounded_digits} must be 0, for exact values alone, or more; raise it")
