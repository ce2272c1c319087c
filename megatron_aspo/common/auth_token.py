"""The token that authenticates Ray's processes to one another: found or created, and never printed."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from megatron_aspo.common.errors import UserError


def find_token(given: str, directory: str, environ: Mapping[str, str], make: bool = True) -> tuple[str, Path]:
    """Return the token and its file: `given`, else that of RAY_AUTH_TOKEN_PATH, else `directory/token`, which is created if missing.

    Raises UserError when the file is unusable or readable by other users.
    """
    named = given or environ.get("RAY_AUTH_TOKEN_PATH", "")
    path = Path(named or Path(directory) / "token").expanduser()
    if not named and make and not path.exists():
        _create(path)
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"token file {path} cannot be read: {error}; name another by --token-file") from error
    if mode & 0o007:
        raise UserError(
            f"token file {path} can be read by every user of this machine (mode {mode & 0o777:o}); chmod 600 it and change the token"
        )
    if len(text) < 16 or len(text.split()) != 1:
        raise UserError(f"token file {path} does not hold one word of at least 16 characters; remove it and a new one is made")
    return text, path


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    unfinished = path.with_name(f"token.{os.getpid()}")
    with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(secrets.token_hex(32))
    try:
        os.link(unfinished, path)  # the first process wins; later ones use its token
    except FileExistsError:
        pass
    finally:
        unfinished.unlink()
