"""Equality of two formulas as functions of their variables, decided by their values at points.

With only rational operations the values are exact, so two different rational functions agree at all points only by an accident that the
fixed points make negligible (Schwartz–Zippel). Otherwise both are computed with 50 and with 120 digits: a difference that is only rounding
shrinks with the precision, any other does not.

Variables are real. Points are skipped at which only one of the two has a real value, or neither has one and they differ (another branch of
a logarithm or root). The formulas are equal if they agree at some point and differ at none.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from megatron_aspo.rewards.math.evaluate import Evaluator, TooLarge, Undefined, Value, context_of
from megatron_aspo.rewards.math.tree import Node

_DIGITS = (50, 120)
_ROUNDING = 20
"""Digits that may be lost to rounding."""
_POINTS = 7
Point = Mapping[str, Fraction]
Values = tuple[Value, Value, Any, Any]
"""Two values, and the largest summand in each, to which rounding is relative."""


def points(names: set[str]) -> Iterator[Point]:
    """Yield 3 points with positive coordinates, 2 with both signs, 2 with small positive integers; without names one empty point."""
    if not names:
        yield {}
        return
    for number in range(_POINTS):
        point = {}
        for rank, name in enumerate(sorted(names)):
            noise = zlib.crc32(f"{name} {number}".encode())
            value = Fraction(noise % 2039 + 211, 1009)
            if number in (3, 4):
                value = -value if (rank + number) % 2 else value
            elif number > 4:
                value = Fraction(noise % 7 + 2 + (number - 5) * 3 + rank % 2)
            point[name] = value
        yield point


def is_proportional(a: Node, b: Node, positive: bool) -> bool:
    """Return whether a = c·b at all points for one number c ≠ 0, which must be positive if that is required."""
    names = a.symbols() | b.symbols()
    anchor = next((point for point in points(names) if _ratio(a, b, point) is not None), None)
    if anchor is None or (positive and not _ratio(a, b, anchor) > 0):
        return False

    def crosswise(point: Point, digits: int) -> Values:
        value, fixed = Evaluator(point, digits), Evaluator(anchor, digits)
        left, right = value.product(value(a), fixed(b)), value.product(value(b), fixed(a))
        scale = max(value.scale, fixed.scale)
        return left, right, scale, scale

    return _agree(crosswise, names)


def _ratio(a: Node, b: Node, point: Point) -> Any:
    """Return a / b at a point; None if either has no value or is 0 or not real."""
    value = Evaluator(point, _DIGITS[0])
    try:
        x, y = value(a), value(b)
    except (Undefined, TooLarge):
        return None
    if x == 0 or y == 0 or value.context.im(value.inexact(x)) != 0 or value.context.im(value.inexact(y)) != 0:
        return None
    return value.context.re(value.inexact(x) / value.inexact(y))


def is_same_function(a: Node, b: Node) -> bool:
    """Return whether a = b wherever both have a real value. Equal trees are the same function, however large its values are."""
    if a == b:
        return True

    def both(point: Point, digits: int) -> Values:
        left, right = Evaluator(point, digits), Evaluator(point, digits)
        return left(a), right(b), left.scale, right.scale

    return _agree(both, a.symbols() | b.symbols())


def _agree(both: Callable[[Point, int], Values], names: set[str]) -> bool:
    agreements = 0
    for point in points(names):
        try:
            same = _agree_at(both, point)
        except Undefined:
            continue
        except TooLarge:
            return False
        if same is False:
            return False
        agreements += same is True
    return agreements > 0


def _agree_at(both: Callable[[Point, int], Values], point: Point) -> bool | None:
    """Return whether two values are equal; None if the point is inconclusive. Raises Undefined and TooLarge."""
    a, b, *_ = both(point, _DIGITS[0])
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    measured = []
    for digits in _DIGITS:
        a, b, *scales = both(point, digits)
        context = context_of(digits)
        a, b = (context.mpf(v.numerator) / v.denominator if isinstance(v, Fraction) else v for v in (a, b))
        if not (context.isfinite(a) and context.isfinite(b)):
            return bool(a == b)
        measured.append((abs(a), abs(b), abs(a - b)))
    unit, shrunk = context.mpf(10) ** (_ROUNDING - _DIGITS[1]), context.mpf(10) ** (_ROUNDING + _DIGITS[0] - _DIGITS[1])
    is_zero = [measured[1][n] <= max(scales[n] * unit, measured[0][n] * shrunk) for n in (0, 1)]
    rounding = max(*scales, abs(a), abs(b)) * unit
    # 1/2006! is not zero, and a value that is zero up to rounding is not 1/2006!.
    if is_zero[0] == is_zero[1] and measured[1][2] <= max(rounding, measured[0][2] * shrunk):
        return True
    real = [abs(context.im(v)) <= abs(v) * unit for v in (a, b)]
    if point and (real[0] != real[1] or not any(real)):
        return None
    return False
