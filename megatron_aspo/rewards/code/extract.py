"""The program in a model's response."""

import re

_THINKING_END = "</think>"
_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([^\s`]*)[^\n`]*$", re.MULTILINE)
_LANGUAGES = ("", "python", "python3", "py")


def extract_code(response: str) -> str | None:
    """Return the last complete fenced block that is Python's or names no language; None if there is none.

    Thinking, up to the last `</think>`, is not looked at. A block that is not closed does not count: the response was truncated.
    """
    text = response.rpartition(_THINKING_END)[2]
    code, opened = None, None
    for fence in _FENCE.finditer(text):
        marks, language = fence[1], fence[2].lower()
        if opened is None:
            opened = fence
        elif marks[0] == opened[1][0] and len(marks) >= len(opened[1]) and not language:
            if opened[2].lower() in _LANGUAGES:
                code = text[opened.end() + 1 : fence.start()]
            opened = None
    return code
