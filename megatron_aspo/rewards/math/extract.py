"""Extraction of the answer from a model's response. Every rule takes time linear in the response's length."""

import re

_THINKING, _THINKING_END = "<think>", "</think>"
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
"""Escaped braces are signs of the answer, not its borders."""
_NUMBER = re.compile(r"(?<![\w.,/])[-−+]?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:/\d+)?(?:\s?\\?%)?", re.ASCII)


def extract_answer(response: str, rule: str = "boxed") -> str | None:
    """Return the answer as written, or None if there is none. rule: that of `MathOptions.extract`.

    Only the text after the last `</think>` counts; unfinished thinking holds no answer. An unclosed box is skipped: the last complete one
    counts.
    """
    text = response.rpartition(_THINKING_END)[2]
    if _THINKING in text:
        return None
    answer = None if rule == "number" else last_boxed(text)
    if answer is None and rule != "boxed":
        answer = last_number(text)
    return answer


def last_boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{…}` that closes and is in no other box; None if there is none."""
    answer = None
    open_braces: list[int | None] = []
    for mark in _BRACE.finditer(text):
        if mark[0] == "{":
            open_braces.append(None)
        elif mark[0].startswith(("\\boxed", "\\fbox")):
            open_braces.append(mark.end())
        elif mark[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                answer = text[start : mark.start()]
    return answer


def last_number(text: str) -> str | None:
    """Return the last number, with its sign, thousands separators, fraction and percent sign; None if there is none."""
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None
