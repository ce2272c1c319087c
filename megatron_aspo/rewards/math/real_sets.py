"""Sets of real numbers as unions of intervals, from the many notations of answers."""

from dataclasses import dataclass

from megatron_aspo.rewards.math.evaluate import Evaluator
from megatron_aspo.rewards.math.tree import INFINITY, Node, negative

_MINUS_INFINITY = negative(INFINITY)


@dataclass(frozen=True)
class Part:
    """An interval; a point if both ends are closed and equal."""

    low: Node
    high: Node
    closed: tuple[bool, bool]


@dataclass(frozen=True)
class RealSet:
    """Intervals ordered by their lower ends, and the variable whose values they are, empty if none is named."""

    parts: tuple[Part, ...]
    variable: str = ""


def as_real_set(node: Node) -> RealSet | None:
    """Return the set that a node describes: an interval, a union, R, a set minus points, an inequality in one variable, or `x ∈ …`.

    None if it describes none; raises Undefined and TooLarge, as an `Evaluator` does, for ends without a value.
    """
    found = _read(node)
    if found is None:
        return None
    return RealSet(tuple(sorted(found.parts, key=lambda part: (_value(part.low), _value(part.high)))), found.variable)


def _read(node: Node) -> RealSet | None:
    match node.op:
        case "interval" | "tuple" if len(node.args) == 2:
            return RealSet((_part(*node.args, node.value if node.op == "interval" else (False, False)),))
        case "set":
            return RealSet(tuple(Part(one, one, (True, True)) for one in node.args))
        case "named_set" if node.value == "R":
            return RealSet((Part(_MINUS_INFINITY, INFINITY, (False, False)),))
        case "member" if node.args[0].op == "symbol" and (inner := _read(node.args[1])) and not inner.variable:
            return RealSet(inner.parts, node.args[0].value)
        case "union":
            sets = [one for part in node.args if (one := _read(part))]
            names = {one.variable for one in sets}
            if len(sets) < len(node.args) or len(names) != 1:
                return None
            return RealSet(tuple(part for one in sets for part in one.parts), names.pop())
        case "minus":
            return _without(node)
        case "relation":
            return _from_inequality(node)
    return None


def _part(low: Node, high: Node, closed: tuple[bool, bool]) -> Part:
    """Return the interval. An end at infinity is open, however it is written."""
    return Part(low, high, (closed[0] and low != _MINUS_INFINITY, closed[1] and high != INFINITY))


def _without(node: Node) -> RealSet | None:
    """Return R without the points of a set."""
    whole, removed = node.args
    if whole.op != "named_set" or whole.value != "R" or removed.op != "set":
        return None
    return RealSet(_between(sorted(removed.args, key=_value)))


def _between(points: list[Node]) -> tuple[Part, ...]:
    ends = [_MINUS_INFINITY, *points, INFINITY]
    return tuple(Part(low, high, (False, False)) for low, high in zip(ends[:-1], ends[1:], strict=True))


def _from_inequality(node: Node) -> RealSet | None:
    """Return the set of x < a, a < x, a < x ≤ b or x ≠ a."""
    args, signs = node.args, node.value
    position = next((n for n, one in enumerate(args) if one.op == "symbol"), None)
    if position is None or any(one.symbols() for n, one in enumerate(args) if n != position):
        return None
    name = args[position].value
    if signs == ("!=",):
        return RealSet(_between([args[1 - position]]), name)
    low, high, closed = _MINUS_INFINITY, INFINITY, [False, False]
    if len(args) > 3 or not set(signs) <= {"<", "<=", ">", ">="} or (len(args) == 3 and position != 1):
        return None
    for n, sign in enumerate(signs):
        end = args[n] if n < position else args[n + 1]
        is_low = (sign[0] == "<") == (n < position)
        if is_low:
            low, closed[0] = end, "=" in sign
        else:
            high, closed[1] = end, "=" in sign
    if len(args) == 3 and (low == _MINUS_INFINITY or high == INFINITY):
        return None
    return RealSet((_part(low, high, (closed[0], closed[1])),), name)


def _value(node: Node) -> float:
    evaluate = Evaluator({}, 30)
    return evaluate.context.re(evaluate.inexact(evaluate(node))) if not node.symbols() else evaluate.context.mpf(0)
