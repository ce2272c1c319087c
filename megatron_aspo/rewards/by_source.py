"""The default reward of a data source, for rows whose reward neither recipe nor user names."""

CODE_SOURCES = ("code", "livecodebench", "humaneval")
"""Beginnings of the names of data sources whose ground truth is tests."""
MATH_SOURCES = ("math", "gsm8k", "aime", "amc", "deepscaler", "olympiad", "minerva", "hmmt")
"""Beginnings of the names of data sources whose ground truth is the answer of a problem in mathematics."""


def reward_of_source(data_source: str) -> str:
    """Return `code` or `math`, or empty where the name says nothing. Owners before a slash are left out: `openai/gsm8k` is gsm8k."""
    name = data_source.lower().rpartition("/")[2]
    return "code" if name.startswith(CODE_SOURCES) else "math" if name.startswith(MATH_SOURCES) else ""
