"""The program in a model's response."""

import re

_THINKING_END = "</think>"
_FENCE = re.compile(r"^[ \t]*(```+|~~~+)(?!~)([^\n`]*)$", re.MULTILINE)
"""Marks and info string. One class and the whole run of tildes, so that a hostile line is refused in linear time."""
_LANGUAGES = ("", "python", "python3", "py")


def extract_code(response: str) -> str | None:
    """Return the last complete fenced block that is Python's or names no language; None if there is none.

    Thinking, up to the last `</think>`, is not looked at. A block that is not closed does not count: the response was truncated.
    """
    text = response.rpartition(_THINKING_END)[2]
    code, opened = None, None
    for fence in _FENCE.finditer(text):
        marks, language = fence[1], _language(fence)
        if opened is None:
            opened = fence
        elif marks[0] == opened[1][0] and len(marks) >= len(opened[1]) and not language:
            if _language(opened) in _LANGUAGES:
                code = text[opened.end() + 1 : fence.start()]
            opened = None
    return code


def _language(fence: re.Match) -> str:
    """Return the first word of the info string, in lower case; empty if there is none."""
    words = fence[2].lower().split(None, 1)
    return words[0] if words else ""
