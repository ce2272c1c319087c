"""The tree of a parsed formula. It is data: nothing in it is ever called or evaluated as code."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any


class Unreadable(Exception):
    """A text is no formula, or one in a notation that this package does not read."""

    def __init__(self, reason: str, known_elsewhere: bool = False):
        """known_elsewhere: whether it may be mathematics in a notation that math-verify reads."""
        super().__init__(reason)
        self.known_elsewhere = known_elsewhere


@dataclass(frozen=True)
class Node:
    """An operation and its arguments.

    Numbers: `number` (value: a Fraction), `decimal` (value: (Fraction, significant digits)), `based` (value: (digits, base)).
    Names: `symbol` (value: its name), `constant` (value: pi, e, i or inf), `dots`, `named_set` (value: one of R, N, Z, Q, C).
    Operations: add, mul, div, pow, neg, root (radicand, degree), factorial, degree, `call` (value: the function), `function` (value: the
    name of an unknown function), `pm` (value: 1 for ±, -1 for ∓).
    Collections: list, set, tuple, `interval` (value: which ends are closed), `matrix` (value: rows, columns), union, minus, `member`
    (element, set), `ratio`, `relation` (value: the signs between the arguments).
    """

    op: str
    args: tuple["Node", ...] = ()
    value: Any = None

    def nodes(self) -> list["Node"]:
        """Return this node and all its descendants."""
        found: list[Node] = [self]
        for node in found:
            found.extend(node.args)
        return found

    def symbols(self) -> set[str]:
        """Return the names of the variables."""
        return {node.value for node in self.nodes() if node.op == "symbol"}


def number(value: Fraction | int) -> Node:
    return Node("number", value=Fraction(value))


INFINITY = Node("constant", value="inf")


def negative(node: Node) -> Node:
    return Node("neg", (node,))
