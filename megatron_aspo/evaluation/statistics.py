"""Statistics of an evaluation: avg@n, pass@k and maj@k of one problem, and intervals by resampling problems.

Nothing here is estimated where it can be computed: pass@k and maj@k are exact means over all subsets of k of a problem's n responses.
"""

from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from fractions import Fraction
from math import comb

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the probability that at least one of k responses, drawn without replacement from `samples`, is right.

    1 − C(n − c, k) / C(n, k), the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, equation 1), computed in integers.
    Raises ValueError if k exceeds the samples: an estimate from fewer would be biased.
    """
    _check(samples, k)
    if not 0 <= right <= samples:
        raise ValueError(f"{right} of {samples} responses cannot be right")
    return float(1 - Fraction(comb(samples - right, k), comb(samples, k)))


def majority_at_k(votes: Sequence[Hashable | None], right: Collection[Hashable], k: int) -> float:
    """Return the probability that the most frequent answer of k responses, drawn without replacement, is right.

    votes: the answer of each response; None, for a response without an answer, does not vote. right: the answers that are right. Of
    several most frequent answers one is chosen at random, so a tie of t answers counts 1/t for each right one among them; k responses
    without any answer are wrong. The mean is over all C(n, k) subsets, counted exactly. Raises ValueError as `pass_at_k` does.
    """
    _check(len(votes), k)
    counts = Counter(vote for vote in votes if vote is not None)
    silent = len(votes) - counts.total()
    total = Fraction(0)
    for answer in counts.keys() & set(right):
        others = [count for other, count in counts.items() if other != answer]
        for chosen in range(1, min(counts[answer], k) + 1):
            subsets = _subsets(others, silent, k - chosen, chosen)
            total += comb(counts[answer], chosen) * sum((Fraction(ways, 1 + ties) for ties, ways in subsets.items()), Fraction(0))
    return float(total / comb(len(votes), k))


def _subsets(counts: Sequence[int], silent: int, size: int, most: int) -> dict[int, int]:
    """Return ties → the number of subsets of `size` responses in which no answer occurs more than `most` times and `ties` answers do.

    counts: how often each answer occurs; silent: responses without an answer.
    """
    ways = {(chosen, 0): comb(silent, chosen) for chosen in range(min(silent, size) + 1)}
    for count in counts:
        extended: dict[tuple[int, int], int] = {}
        for (before, ties), number in ways.items():
            for chosen in range(min(count, most, size - before) + 1):
                key = (before + chosen, ties + (chosen == most))
                extended[key] = extended.get(key, 0) + number * comb(count, chosen)
        ways = extended
    return {ties: number for (chosen, ties), number in ways.items() if chosen == size}


def resample(problems: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Return the positions of the problems of each resample, int64 [resamples, problems], drawn with replacement."""
    return np.random.default_rng(seed).integers(problems, size=(resamples, problems))


def interval_of_mean(values: np.ndarray, positions: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the percentile-bootstrap interval of the mean of `values`, float64 [problems] (Efron 1979).

    positions: int [resamples, problems], as `resample` returns. The problem is the unit that is resampled, since the responses to one
    problem are not independent. Quantiles are interpolated linearly between the ordered means of the resamples.
    """
    means = np.asarray(values, dtype=np.float64)[positions].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _check(samples: int, k: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k = {k} needs at least 1 and at most the {samples} responses of a problem")
