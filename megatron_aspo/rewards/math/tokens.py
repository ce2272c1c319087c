"""Tokens of a formula, and the tokenizer."""

import re
from dataclasses import dataclass

from megatron_aspo.rewards.math.notation import BRACKETED, FUNCTIONS
from megatron_aspo.rewards.math.tree import Unreadable

MAX_CHARACTERS = 4000
"""Maximum number of characters; a longer answer is compared only as text."""
_MAX_TOKENS = 1500
_NAMES = sorted((*FUNCTIONS, *BRACKETED, "pi", "infinity", "infty", "inf", "oo"), key=len, reverse=True)
_TEXT = r"\\(?:text|textrm|textbf|textit|mbox|mathrm|operatorname\*?|textnormal|mathsf|mathbb|mathcal)\s*\{(?P<inner>[^{}]*)\}"
_TOKEN = re.compile(
    rf"(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d{{1,6}}(?![A-Za-z\d]))?|\.\d+)|(?P<text>{_TEXT})|(?P<command>\\[A-Za-z]+|\\.)"
    r"|(?P<word>[A-Za-z]+)|(?P<blank> +)|(?P<sign>.)",
    re.ASCII | re.DOTALL,
)


@dataclass(frozen=True)
class Token:
    kind: str
    r"""number, text (content of `\text{}`), command (`\frac` is frac, `\{` itself), name (of a function or constant), letter, sign, end."""
    text: str
    start: int
    spaced: bool = False
    """Whether it follows a blank."""


def tokenize(text: str) -> list[Token]:
    """Return the tokens of a cleaned text, followed by an end token. Raises Unreadable if it is too long."""
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(f"longer than {MAX_CHARACTERS} characters")
    tokens: list[Token] = []
    spaced = False
    for found in _TOKEN.finditer(text):
        kind, start = found.lastgroup, found.start()
        assert kind is not None  # each alternative of _TOKEN is a named group
        if kind == "inner" or found["text"]:
            tokens.append(_named(found, spaced))
        elif kind == "blank":
            spaced = True
            continue
        elif kind == "word":
            tokens.extend(_split_word(found[0], start, spaced))
        else:
            named = kind == "command" and found[0][1:].isalpha()
            tokens.append(Token(kind, found[0][1:] if named else found[0], start, spaced))
        spaced = False
    if len(tokens) > _MAX_TOKENS:
        raise Unreadable(f"more than {_MAX_TOKENS} signs")
    return [*tokens, Token("end", "", len(text))]


def _named(found: re.Match, spaced: bool) -> Token:
    inner = found["inner"].strip()
    if found[0].startswith("\\mathbb"):
        return Token("named_set", inner, found.start(), spaced)
    kind = "name" if inner in (*FUNCTIONS, *BRACKETED) else "letter" if len(inner) == 1 and inner.isalpha() else "text"
    return Token(kind, inner, found.start(), spaced)


def _split_word(word: str, start: int, spaced: bool) -> list[Token]:
    """Split a word into names of functions and constants, and single letters between them."""
    tokens, position = [], 0
    while position < len(word):
        name = next((name for name in _NAMES if word.startswith(name, position)), None)
        length = len(name) if name else 1
        kind = "name" if name else "letter"
        tokens.append(Token(kind, word[position : position + length], start + position, spaced and position == 0))
        position += length
    return tokens
