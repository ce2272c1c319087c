"""Repetition in a text."""

from collections import Counter

NGRAM = 20


def repeated_ngrams(text: str, n: int = NGRAM) -> tuple[float, int]:
    """Return the share of the text's n-grams of lower-cased words that occur more than once, and the count of the most frequent one."""
    words = text.lower().split()
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = counts.total()
    if not total:
        return 0.0, 0
    return sum(count for count in counts.values() if count > 1) / total, max(counts.values())
