"""Extraction of the program from a model's response."""

import re

_THINKING_END = "</think>"
_FENCE = re.compile(r"^[ \t]*(```+|~~~+)(?!~)([^\n`]*)$", re.MULTILINE)
"""Fence marks and info string. The single class and the whole run of tildes let a hostile line be rejected in linear time."""
_LANGUAGES = ("", "python", "python3", "py")
_ARCHER_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def extract_code(response: str) -> str | None:
    """Return the last complete fenced block in Python or without a language; None if there is none.

    Thinking, up to the last `</think>`, is ignored. An unclosed block does not count: the response was truncated.
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


def extract_archer(response: str) -> str | None:
    """Return the last ```python block after the first `</think>`, or of the whole response without one, as Archer2.0's grader does."""
    before, end, after = response.partition(_THINKING_END)
    blocks = _ARCHER_BLOCK.findall(after if end else before)
    return blocks[-1] if blocks else None


def extract_livecodebench(response: str) -> str | None:
    """Return the text between the last two lines with ```, in any language, as LiveCodeBench does; None if there are fewer."""
    lines = response.split("\n")
    marks = [number for number, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[marks[-2] + 1 : marks[-1]]) if len(marks) > 1 else None


BLOCKS = {"last": extract_code, "archer": extract_archer, "livecodebench": extract_livecodebench}
"""`data.code.block` → the function that finds the program in a response."""


def _language(fence: re.Match) -> str:
    """Return the first word of the info string in lower case; empty if there is none."""
    words = fence[2].lower().split(None, 1)
    return words[0] if words else ""
