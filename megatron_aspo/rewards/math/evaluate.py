"""The value of a formula at a point: by exact rational arithmetic where possible, else to a given number of digits, with bounded work.

Exact numbers have at most MAX_BITS bits, others a binary exponent of at most MAX_EXPONENT: the size of a power, a factorial or a binomial
is estimated before it is computed. Larger ones raise TooLarge.
"""

import functools
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import mpmath
from mpmath.libmp import NoConvergence

from megatron_aspo.rewards.math.tree import Node

MAX_BITS = 1 << 18
MAX_EXPONENT = 1 << 24
_WORK_BITS = 1 << 23
"""Upper bound on the total bits of all exact intermediate values."""
Value = Any
"""A Fraction, or mpmath's mpf or mpc."""


class TooLarge(Exception):
    """A number in a formula, or in its evaluation, would exceed the bounds of this module; it is not computed."""


class Undefined(Exception):
    """There is no value: a division by zero, the logarithm of zero, or an operation that is not computed here."""


@functools.cache
def context_of(digits: int) -> Any:
    """Return mpmath's arithmetic with this number of digits. It is shared and must not be changed."""
    context = mpmath.MPContext()
    context.dps = digits
    return context


class Evaluator:
    """Evaluates formulas at a point, in one precision."""

    def __init__(self, point: Mapping[str, Fraction], digits: int):
        """point: the value of each variable; digits: precision of values that are not rational."""
        self._point, self._bits_left = point, _WORK_BITS
        self.context = context_of(digits)
        self.scale: Any = self.context.mpf(0)
        """Largest absolute value of a summand so far."""

    def __call__(self, node: Node) -> Value:
        """Return the value of a formula. Raises TooLarge and Undefined."""
        try:
            return self._bounded(self._value(node))
        except (ZeroDivisionError, ValueError, TypeError, NoConvergence) as error:
            raise Undefined(str(error)) from error
        except (OverflowError, MemoryError, RecursionError) as error:
            raise TooLarge(str(error)) from error

    def _value(self, node: Node) -> Value:
        match node.op:
            case "number":
                return node.value
            case "decimal":
                return node.value[0]
            case "based":
                return Fraction(int(node.value[0], node.value[1]))
            case "symbol":
                return self._point[node.value]
            case "constant":
                return self._constant(node.value)
            case "add":
                return self._sum([self(argument) for argument in node.args])
            case "neg":
                return -self(node.args[0])
            case "mul":
                return self.product(self(node.args[0]), self(node.args[1]))
            case "div":
                return self._divide(self(node.args[0]), self(node.args[1]))
            case "pow":
                return self._power(self(node.args[0]), self(node.args[1]))
            case "root":
                return self._root(self(node.args[0]), self(node.args[1]))
            case "factorial":
                return self._factorial(self(node.args[0]))
            case "degree":
                return self.product(self.context.pi / 180, self(node.args[0]))
            case "call":
                return self._call(node.value, [self(argument) for argument in node.args])
            case "function":
                # Any smooth function of the argument serves, a different one for each name.
                return self.context.cos(self.inexact(self(node.args[0])) * sum(node.value.encode()) / 100 + 1)
        raise Undefined(f"{node.op} is no number")

    def _bounded(self, value: Value) -> Value:
        if isinstance(value, Fraction):
            bits = value.numerator.bit_length() + value.denominator.bit_length()
            self._bits_left -= bits
            if bits > MAX_BITS or self._bits_left < 0:
                raise TooLarge("a fraction with too many digits")
        elif self.context.isnan(value):
            raise Undefined("not a number")
        elif self.context.isfinite(value) and value != 0 and abs(self._exponent(value)) > MAX_EXPONENT:
            raise TooLarge("a number with too large an exponent")
        return value

    def inexact(self, value: Value) -> Any:
        """Return the value as an mpmath number."""
        return self.context.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value

    def _exponent(self, value: Value) -> float:
        """Return approximately the binary logarithm of the absolute value; 0 for zero."""
        if value == 0:
            return 0
        if isinstance(value, Fraction):
            return value.numerator.bit_length() - value.denominator.bit_length()
        return self.context.mag(value)

    def _constant(self, name: str) -> Value:
        context = self.context
        return {"pi": +context.pi, "e": +context.e, "i": context.mpc(0, 1), "inf": context.inf}[name]

    def _sum(self, values: list[Value]) -> Value:
        total = values[0]
        for value in values[1:]:
            if isinstance(total, Fraction) != isinstance(value, Fraction):
                total, value = self.inexact(total), self.inexact(value)
            total = total + value
        if not isinstance(total, Fraction):
            self.scale = max([self.scale, *(abs(self.inexact(value)) for value in values)])
        return total

    def product(self, a: Value, b: Value) -> Value:
        """Return a·b, exact if both are."""
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a * b
        return self.inexact(a) * self.inexact(b)

    def _divide(self, a: Value, b: Value) -> Value:
        if b == 0:
            raise Undefined("a division by zero")
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a / b
        return self.inexact(a) / self.inexact(b)

    def _power(self, base: Value, exponent: Value) -> Value:
        if isinstance(exponent, Fraction):
            if exponent.denominator == 1:
                return self._integer_power(base, exponent.numerator)
            if isinstance(base, Fraction) and exponent.denominator <= 64 and (base >= 0 or exponent.denominator % 2):
                return self._integer_power(self._root(base, Fraction(exponent.denominator)), exponent.numerator)
        base, exponent = self.inexact(base), self.inexact(exponent)
        if base == 0:
            if self.context.re(exponent) <= 0:
                raise Undefined("a power of zero")
            return Fraction(0)
        if self._exponent(exponent) > 40 or abs(self._exponent(base)) * abs(exponent) > 2 * MAX_EXPONENT:
            raise TooLarge("a power")
        return self.context.power(base, exponent)

    def _integer_power(self, base: Value, exponent: int) -> Value:
        if base == 0 and exponent <= 0:
            raise Undefined("a power of zero")
        if isinstance(base, Fraction):
            if abs(base) in (0, 1):
                return base if exponent % 2 or base >= 0 else -base
            if max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent) > MAX_BITS:
                raise TooLarge("a power")
            return base**exponent
        if exponent.bit_length() > 40 or abs(self._exponent(base)) * abs(exponent) > 2 * MAX_EXPONENT:
            raise TooLarge("a power")
        return self.context.power(base, exponent)

    def _root(self, value: Value, degree: Value) -> Value:
        if not isinstance(degree, Fraction) or degree.denominator != 1 or not 1 <= degree <= 1000:
            return self._power(value, self._divide(Fraction(1), degree))
        n = degree.numerator
        if isinstance(value, Fraction):
            if value < 0 and n % 2:
                return -self._root(-value, degree)
            if value >= 0:
                above, below = _exact_root(value.numerator, n), _exact_root(value.denominator, n)
                if above is not None and below is not None:
                    return Fraction(above, below)
        value = self.inexact(value)
        if value == 0:
            return Fraction(0)
        if n % 2 and self.context.im(value) == 0 and self.context.re(value) < 0:
            return -self.context.root(-self.context.re(value), n)
        return self.context.root(value, n)

    def _factorial(self, value: Value) -> Value:
        if isinstance(value, Fraction) and value.denominator == 1:
            if value < 0:
                raise Undefined("the factorial of a negative number")
            if value * max(1, value.numerator.bit_length() - 1) > MAX_BITS:
                raise TooLarge("a factorial")
            return Fraction(math.factorial(value.numerator))
        if self._exponent(value) > 16:
            raise TooLarge("a factorial")
        return self.context.factorial(self.inexact(value))

    def _binomial(self, n: Value, k: Value) -> Value:
        if all(isinstance(value, Fraction) and value.denominator == 1 for value in (n, k)) and n >= 0:
            if not 0 <= k <= n:
                return Fraction(0)
            if min(k, n - k) * n.numerator.bit_length() > MAX_BITS:
                raise TooLarge("a binomial")
            return Fraction(math.comb(n.numerator, k.numerator))
        if max(self._exponent(n), self._exponent(k)) > 16:
            raise TooLarge("a binomial")
        return self.context.binomial(self.inexact(n), self.inexact(k))

    def _call(self, name: str, values: list[Value]) -> Value:
        if name == "binom":
            return self._binomial(*values)
        if name in ("gcd", "lcm"):
            if not all(isinstance(value, Fraction) and value.denominator == 1 for value in values):
                raise Undefined(f"{name} of what is no integer")
            return Fraction(getattr(math, name)(*(value.numerator for value in values)))
        if name in ("max", "min"):
            return (max if name == "max" else min)(values)
        if len(values) != 1:
            raise Undefined(f"{name} with {len(values)} arguments")
        (value,) = values
        if name == "abs":
            return abs(value)
        if name in ("floor", "ceil"):
            return self._rounded(name, value)
        return self._function(name, self.inexact(value))

    def _rounded(self, name: str, value: Value) -> Value:
        if not isinstance(value, Fraction):
            if self.context.im(value) != 0 or self._exponent(value) > 4 * self.context.prec // 5:
                raise Undefined(f"{name} of an inexact number")
            near = self.context.nint(value)
            if abs(value - near) < self.context.mpf(10) ** (-self.context.dps // 2):
                return Fraction(int(near))  # an integer up to rounding
            value = getattr(self.context, name)(value)
            return Fraction(int(value))
        return Fraction(math.floor(value) if name == "floor" else math.ceil(value))

    def _function(self, name: str, value: Any) -> Value:
        context = self.context
        if name in ("ln", "log", "lg"):
            if value == 0:
                raise Undefined("the logarithm of zero")
            return context.log10(value) if name == "lg" else context.log(value)
        if self._exponent(value) > (24 if name in ("exp", "sinh", "cosh", "tanh", "coth") else 2048):
            raise TooLarge(f"the argument of {name}")
        known = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "arcsinh": "asinh", "arccosh": "acosh", "arctanh": "atanh"}
        known |= {"arccot": "acot", "arcsec": "asec", "arccsc": "acsc"}
        known |= {same: same for same in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "exp")}
        if name not in known:
            raise Undefined(f"{name} is not computed here")
        return getattr(context, known[name])(value)


def _exact_root(value: int, degree: int) -> int | None:
    """Return the integer root of `value`, or None if it is not a perfect power."""
    if value < 2 or degree == 1:
        return value
    if degree == 2:
        root = math.isqrt(value)
    else:
        bits = value.bit_length()
        if bits > 1 << 14:
            return None
        low, high = 0, 1 << (bits // degree + 1)
        while low < high:  # the largest integer whose power is at most the value
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
        root = low
    return root if root**degree == value else None
