"""The order in which a finite set of prompts is drawn."""

import functools
import random


def shuffled_position(seed: int, index: int, size: int) -> int:
    """Which of `size` items is draw number `index` (from 0): epochs over all items, each in an order of its own.

    A function of its arguments alone, so that a resumed run goes on with the same prompts.
    """
    epoch, place = divmod(index, size)
    return _epoch_order(seed, epoch, size)[place]


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    order = list(range(size))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return order
