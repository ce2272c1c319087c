"""Default rewards by data source, for rows whose reward neither the recipe nor the user chooses."""

CODE_SOURCES = ("code", "livecodebench", "humaneval")
"""Prefixes of the names of data sources whose ground truth is tests."""
MATH_SOURCES = ("math", "gsm8k", "aime", "amc", "deepscaler", "olympiad", "minerva", "hmmt")
"""Prefixes of the names of data sources whose ground truth is the answer to a problem in mathematics."""


def reward_of_source(data_source: str) -> str:
    """Return `code` or `math`, or empty if the name implies neither. An owner before a slash is ignored: `openai/gsm8k` is gsm8k."""
    name = data_source.lower().rpartition("/")[2]
    return "code" if name.startswith(CODE_SOURCES) else "math" if name.startswith(MATH_SOURCES) else ""
