"""The order in which finite sets of prompts are drawn. Pure functions, so that a resumed run continues with the same prompts."""

import functools
import random
from array import array
from collections.abc import Sequence
from fractions import Fraction


def shuffled_position(seed: int | str, index: int, size: int) -> int:
    """Return the position, among `size` items, of draw number `index` (from 0): epochs over all items, each in a different order."""
    epoch, draw = divmod(index, size)
    return _epoch_order(seed, epoch, size)[draw]


@functools.lru_cache(maxsize=16)
def _epoch_order(seed: int | str, epoch: int, size: int) -> "array[int]":
    order = array("Q", range(size))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return order


def choose_source(weights: Sequence[float], index: int) -> tuple[int, int]:
    """Return the source of draw number `index` (from 0) of a mixture, and the number of earlier draws from that source.

    weights: above 0, one for each source. The first source is drawn whenever its share of the draws so far reaches a whole number; the
    others share the rest in the same way: after any number of draws each source is less than `len(weights)` draws from its share.
    """
    shares = [Fraction(str(weight)) for weight in weights]
    for source in range(len(shares) - 1):
        share = shares[source] / sum(shares[source:])
        before = int(index * share)
        if int((index + 1) * share) > before:
            return source, before
        index -= before
    return len(shares) - 1, index
