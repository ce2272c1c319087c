"""The result of one check on one node, and the conversion of errors into results."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.import_path import one_line

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Record:
    """The result of one check."""

    check: str
    """Name of the check, as the table prints it."""
    status: Status
    detail: str
    """The finding, for people."""
    cure: str = ""
    """The cure; empty only when the status is `ok`."""
    facts: dict[str, str] = field(default_factory=dict)
    """Values that must be the same on all nodes, by name."""
    node: str = ""
    """The checked node; set by the runner of the checks."""


def ok(check: str, detail: str, facts: dict[str, str] | None = None) -> Record:
    return Record(check, "ok", detail, facts=facts or {})


def warning(check: str, detail: str, cure: str, facts: dict[str, str] | None = None) -> Record:
    return Record(check, "warning", detail, cure, facts or {})


def failed(check: str, detail: str, cure: str, facts: dict[str, str] | None = None) -> Record:
    return Record(check, "failed", detail, cure, facts or {})


def refused(check: str, error: UserError, status: Status = "failed", otherwise: str = "correct what the message names") -> Record:
    """Return the record of a UserError, whose text is `what is wrong; the cure`. otherwise: the cure if the text has none."""
    detail, _, cure = str(error).partition("; ")
    return Record(check, status, detail, cure or otherwise)


def broken(check: str, error: BaseException) -> Record:
    """Return the record of a check that raised an unexpected exception."""
    return failed(check, f"the check itself failed: {one_line(error)}", "report this with the output of megatron-aspo doctor --json")
