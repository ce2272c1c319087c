"""Removal of secrets, home directories and the user's name from text for an issue report."""

import os
import pwd
import re
from collections.abc import Mapping
from dataclasses import replace

from megatron_aspo.doctor.record import Record

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(^|_)(API_?)?KEY($|_)", re.IGNORECASE)
_SHORTEST_SECRET = 6
_SHORTEST_USER = 3
"""Shorter names are parts of too many words."""
_COMMON_USERS = {"root", "ray", "user", "ubuntu", "nobody", "admin", "ec2-user", "jovyan"}
"""Names that identify nobody."""


def redact(record: Record) -> Record:
    """Return the record without the secrets, the home directory and the user's name of this process."""
    clean = redactor(os.environ, _user())
    return replace(
        record,
        detail=clean(record.detail),
        cure=clean(record.cure),
        node=clean(record.node),
        facts={clean(name): clean(value) for name, value in record.facts.items()},
    )


def redactor(environment: Mapping[str, str], user: str):
    """Return a function that removes the environment's secrets, home directory and user from a text."""
    secrets = [value for name, value in environment.items() if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET]
    home = environment.get("HOME", "").rstrip("/")

    def clean(text: str) -> str:
        for secret in sorted(secrets, key=len, reverse=True):
            text = text.replace(secret, "<secret>")
        if home:
            text = re.sub(rf"{re.escape(home)}(?=$|[^\w.-])", "~", text)
        # Other home directories, such as those of other users on a shared file system.
        text = re.sub(r"/(home|Users)/[^/\s]+", r"/\1/<user>", text)
        if len(user) >= _SHORTEST_USER and user not in _COMMON_USERS:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(user)}(?![A-Za-z0-9])", "<user>", text)
        return text

    return clean


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return ""
