"""Rounds of node pairs: the pairs of a round are tried at the same time."""

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def pair_rounds(items: Sequence[Item]) -> list[list[tuple[Item, Item]]]:
    """Return all pairs of the items in the fewest rounds, each item at most once in a round.

    This is the circle method of tournaments: one item stays, the others rotate by one position from round to round. With an odd number of
    items, one pauses in each round.

    >>> pair_rounds("abcd")
    [[('a', 'd'), ('b', 'c')], [('a', 'c'), ('d', 'b')], [('a', 'b'), ('c', 'd')]]
    """
    circle: list[Item | None] = [*items]
    if len(circle) % 2:
        circle.append(None)
    result = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        result.append([(one, other) for one, other in pairs if one is not None and other is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return result
