"""Sums and counts of logged figures, which add up over micro-batches, ranks and mini-batches."""

Tally = dict[str, tuple[float, float]]
"""Name → (sum, count); the figure is sum / count."""


def add_tallies(*tallies: Tally) -> Tally:
    """Name by name, sums and counts added."""
    result: Tally = {}
    for tally in tallies:
        for name, (total, count) in tally.items():
            before = result.get(name, (0.0, 0.0))
            result[name] = (before[0] + total, before[1] + count)
    return result


def means(tally: Tally) -> dict[str, float]:
    """Name → sum / count, without those that counted nothing."""
    return {name: total / count for name, (total, count) in tally.items() if count}
