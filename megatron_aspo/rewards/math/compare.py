"""Equality of two answers: collections element by element, everything else as functions (`identity.py`). Symmetric in its arguments.

- A list without brackets has no order, but a tuple and a list with an ellipsis do; a set has neither order nor repetitions.
- A list equals a set with the same elements, and a tuple with the same elements in its order. (1, 2) is both a pair and an open interval.
- An inequality or `x ∈ …` equals its interval, whatever the variable's name if one side has none.
- `x = 5` equals 5, and `x = 1, y = 2` equals the pair (1, 2); x = 5 and y = 5 differ, and x + y = 1 is not 1. Equations are equal if the
  differences of their sides are proportional, inequalities if they are so with a positive factor. Names matter: x + C and x + K differ.
- A ratio equals one with proportional terms, and a number if it has two terms.
- ± stands for both values. A column equals the tuple of its elements.
"""

from collections.abc import Sequence

from megatron_aspo.rewards.math.evaluate import Evaluator, TooLarge, Undefined
from megatron_aspo.rewards.math.identity import is_proportional, is_same_function
from megatron_aspo.rewards.math.real_sets import Part, as_real_set
from megatron_aspo.rewards.math.tree import Node, negative

_MAX_ELEMENTS = 200
_ORDERS = {"<", "<=", ">", ">="}


class Comparison:
    def __init__(self, rounded_digits: int):
        """rounded_digits: that of `MathOptions`."""
        self._rounded_digits = rounded_digits

    def equal(self, a: Node, b: Node) -> bool:
        if a == b:
            return True
        a, b = _expand_plus_minus(a), _expand_plus_minus(b)
        a, b = self._value_of_equation(a, b), self._value_of_equation(b, a)
        kinds = {a.op, b.op}
        if kinds & {"relation", "member", "interval", "union", "minus", "named_set"} and (verdict := self._as_real_sets(a, b)) is not None:
            return verdict
        if "ratio" in kinds:
            return self._ratios(a, b)
        if kinds == {"relation"}:
            return self._relations(a, b)
        if kinds == {"tuple", "interval"} or kinds & {"list", "set", "tuple", "matrix"}:
            return self._collections(a, b)
        if "dots" in kinds or kinds & {"relation", "member", "interval", "union", "minus", "named_set"}:
            return False
        return self._rounded(a, b) or self._rounded(b, a) or is_same_function(a, b)

    def _value_of_equation(self, a: Node, other: Node) -> Node:
        """Return the value that an answer names, as in `x = 5`, `f(x) = 2x` or `AB = 5`, if the other answer is no equation."""
        if other.op in ("relation", "member", "union"):
            return a
        if a.op == "relation" and set(a.value) == {"="} and (_is_name(a.args[0]) or not a.args[0].symbols()) and self._is_consistent(a):
            return a.args[-1]
        equations = [one for one in a.args if one.op == "relation" and one.value == ("=",)]
        if a.op != "list" or not equations or any(one.op == "relation" for one in other.args):
            return a
        values = {one.args[0]: one.args[1] for one in equations}
        if len(values) == len(a.args) and all(name.op == "symbol" for name in values):
            return Node("tuple", tuple(values[name] for name in sorted(values, key=lambda name: name.value)))
        if len(values) == 1:  # the solutions for one unknown
            return Node("set", tuple(one.args[1] if one.op == "relation" else one for one in a.args))
        return a

    def _is_consistent(self, equation: Node) -> bool:
        """Return whether all numeric sides are equal: x = 5 = 6 has no value."""
        sides = [side for side in equation.args if not side.symbols()]
        return all(self.equal(side, equation.args[-1]) for side in sides if side is not equation.args[-1])

    def _as_real_sets(self, a: Node, b: Node) -> bool | None:
        """Compare as sets of real numbers; None if either is not one."""
        try:
            x, y = as_real_set(a), as_real_set(b)
        except (Undefined, TooLarge):
            return None
        if x is None or y is None:
            return None
        if x.variable and y.variable and x.variable != y.variable:
            return False
        return len(x.parts) == len(y.parts) and all(self._parts(p, q) for p, q in zip(x.parts, y.parts, strict=True))

    def _parts(self, p: Part, q: Part) -> bool:
        return p.closed == q.closed and self.equal(p.low, q.low) and self.equal(p.high, q.high)

    def _relations(self, a: Node, b: Node) -> bool:
        if len(a.value) != len(b.value):
            return False
        if len(a.value) > 1:
            backwards = Node("relation", a.args[::-1], tuple(_flipped(sign) for sign in a.value[::-1]))
            return any(
                one.value == b.value and all(self.equal(x, y) for x, y in zip(one.args, b.args, strict=True)) for one in (a, backwards)
            )
        (sign,), (other,) = a.value, b.value
        left, right = _difference(a), _difference(b)
        if sign in _ORDERS and other == _flipped(sign):
            return is_proportional(left, _difference(Node("relation", b.args[::-1], b.value)), positive=True)
        return sign == other and is_proportional(left, right, positive=sign in _ORDERS)

    def _ratios(self, a: Node, b: Node) -> bool:
        """Compare ratios: 3:4 equals 6:8, and 3/4."""
        if a.op == b.op:
            crosswise = ((Node("mul", (x, b.args[0])), Node("mul", (y, a.args[0]))) for x, y in zip(a.args[1:], b.args[1:], strict=False))
            return len(a.args) == len(b.args) and all(is_same_function(*pair) for pair in crosswise)
        ratio, other = (a, b) if a.op == "ratio" else (b, a)
        return len(ratio.args) == 2 and other.op not in ("list", "set", "tuple", "matrix") and self.equal(Node("div", ratio.args), other)

    def _collections(self, a: Node, b: Node) -> bool:
        if a.op == "matrix" and b.op == "matrix":
            return a.value == b.value and self._in_order(a.args, b.args)
        for x, y in ((a, b), (b, a)):
            if x.op == "matrix":
                return y.op == "tuple" and x.value[1] == 1 and self._in_order(x.args, y.args)
        if {a.op, b.op} == {"tuple", "interval"}:
            return False
        if a.op not in ("list", "set", "tuple") or b.op not in ("list", "set", "tuple"):
            # A set of one element: {5} and 5 are not distinguished.
            single, other = (a, b) if a.op in ("list", "set", "tuple") else (b, a)
            return single.op == "set" and len(single.args) == 1 and self.equal(single.args[0], other)
        ordered = any(node.op == "dots" for node in (*a.args, *b.args))
        if "tuple" in (a.op, b.op):
            return "set" not in (a.op, b.op) and self._in_order(a.args, b.args)
        if ordered:
            return self._in_order(a.args, b.args)
        if a.op == b.op == "set":
            return self._subset(a.args, b.args) and self._subset(b.args, a.args)
        return self._matched(a.args, b.args)

    def _in_order(self, a: Sequence[Node], b: Sequence[Node]) -> bool:
        return len(a) == len(b) and all(self.equal(x, y) for x, y in zip(a, b, strict=True))

    def _subset(self, a: Sequence[Node], b: Sequence[Node]) -> bool:
        return max(len(a), len(b)) <= _MAX_ELEMENTS and all(any(self.equal(x, y) for y in b) for x in a)

    def _matched(self, a: Sequence[Node], b: Sequence[Node]) -> bool:
        """Return whether both have the same elements, each equally often."""
        if len(a) != len(b) or len(a) > _MAX_ELEMENTS:
            return False
        rest = list(b)
        for x in a:
            position = next((n for n, y in enumerate(rest) if self.equal(x, y)), None)
            if position is None:
                return False
            del rest[position]
        return True

    def _rounded(self, decimal: Node, other: Node) -> bool:
        """Return whether a decimal with enough digits is the rounded or truncated value of the other number, if that is no decimal."""
        sign = 1
        if decimal.op == "neg":
            decimal, sign = decimal.args[0], -1
        if decimal.op != "decimal" or not self._rounded_digits or other.symbols():
            return False
        if any(node.op == "decimal" for node in other.nodes()):
            return False
        value, digits = decimal.value
        if digits < self._rounded_digits or value == 0:
            return False
        evaluator = Evaluator({}, 50)
        try:
            exact = evaluator.inexact(evaluator(other))
        except (Undefined, TooLarge):
            return False
        context = evaluator.context
        if context.im(exact) != 0 or not context.isfinite(exact):
            return False
        step = context.mpf(10) ** (context.floor(context.log10(evaluator.inexact(value))) - digits + 1)
        missing = context.re(exact) * sign - evaluator.inexact(value)
        return bool(abs(missing) <= step / 2 * (1 + context.mpf(10) ** -30) or 0 <= missing < step)


def _expand_plus_minus(node: Node) -> Node:
    """Return a list of both values if the answer has ±; elements of a list or set are expanded too."""
    if node.op in ("list", "set") and any(one.op != "list" and _has_sign(one) for one in node.args):
        return Node(node.op, tuple(part for one in node.args for part in (_both_signs(one) if _has_sign(one) else (one,))))
    return Node("list", _both_signs(node)) if _has_sign(node) and node.op not in ("list", "set", "tuple", "matrix") else node


def _both_signs(node: Node) -> tuple[Node, Node]:
    return _with_sign(node, 1), _with_sign(node, -1)


def _has_sign(node: Node) -> bool:
    return any(part.op == "pm" for part in node.nodes())


def _with_sign(node: Node, sign: int) -> Node:
    args = tuple(_with_sign(part, sign) for part in node.args)
    if node.op == "pm":
        return Node("add", (args[0], args[1] if node.value == sign else negative(args[1])))
    return Node(node.op, args, node.value)


def _is_name(node: Node) -> bool:
    """Return whether this names a quantity: x, f(x), AB, P(A), |AB|, (x, y). Any other side makes an equation: x + y = 1 is not 1."""
    if node.op == "mul":
        return all(part.op == "mul" or (part.op == "symbol" and part.value[0].isupper()) for part in node.nodes())
    if node.op == "tuple" or (node.op == "call" and node.value == "abs"):
        return all(_is_name(part) for part in node.args)
    return node.op in ("symbol", "function")


def _difference(relation: Node) -> Node:
    return Node("add", (relation.args[0], negative(relation.args[1])))


def _flipped(sign: str) -> str:
    return {"<": ">", "<=": ">=", ">": "<", ">=": "<="}.get(sign, sign)
