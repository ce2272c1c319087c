"""Texts on which two readings of one tokenizer are compared."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

PROBES = (
    "What is 12 + 30?  Answer with only the number.",
    "x  12 345.6789 1,000,000 v2.0b1 0x1F",
    "def f(x):\n    if x:\n\treturn x ** 2  # squared\n\n\n\tdone\r\n",
    "   three spaces, then     five \n\n \n end   ",
    "I'm we'll DON'T they've «quoted» (a,b);[c]{d} http://a.b/c?d=e&f",
    "Zoë paid 1,234.50 € for naïve 日本語 and 🙂🙂 Привет, мир! مرحبا नमस्ते สวัสดี Cafe\u0301 ﬁ ½",
    r"\boxed{\frac{1}{2}} $x^2 \leq 3$ \begin{align*} a &= b \\ \end{align*}",
)
"""Code with indentation, numbers, several scripts, runs of spaces and newlines, contractions, composed and decomposed accents, LaTeX."""


@dataclass(frozen=True)
class Reading:
    """One way to read a tokenizer's files."""

    encode: Callable[[str], list[int]]
    """Text → token ids."""
    decode: Callable[[list[int]], str]
    """Token ids → text, special tokens kept."""
    tokens: Callable[[list[int]], list[str]]
    """Token ids → the vocabulary's strings, for errors."""


def first_difference(expected: Reading, found: Reading, texts: Iterable[str] = PROBES) -> str:
    """Describe the first text that the two readings encode or decode differently; empty if there is none."""
    for text in texts:
        right, ours = expected.encode(text), found.encode(text)
        if right != ours:
            at = _first_unlike(right, ours)
            return f"{text!r} becomes {_shown(found.tokens(ours), at)} instead of {_shown(expected.tokens(right), at)}"
        if (right_text := expected.decode(right)) != (our_text := found.decode(right)):
            at = _first_unlike(right_text, our_text)
            return f"the tokens of {text!r} decode to {our_text[at : at + 20]!r} instead of {right_text[at : at + 20]!r} (character {at})"
    return ""


def _first_unlike(a: Sequence, b: Sequence) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _shown(tokens: list[str], at: int) -> str:
    """Return the tokens around position `at`, quoted."""
    start = max(0, at - 1)
    return ("… " if start else "") + " ".join(map(repr, tokens[start : at + 4]))
