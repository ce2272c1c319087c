"""The default reward of a data source, for rows whose reward neither recipe nor user names."""

CODE_SOURCES = ("code", "livecodebench", "humaneval")
"""Beginnings of the names of data sources whose ground truth is tests."""


def reward_of_source(data_source: str) -> str:
    """Return `code`, or empty where the name says nothing."""
    return "code" if data_source.lower().startswith(CODE_SOURCES) else ""
