"""A fixture that runs a conversion that must be refused."""

import signal
from pathlib import Path

import pytest

from megatron_aspo.cli import main


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Runs the command, which must be refused without a trace; returns its one line."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps handling interrupts

    def run(*arguments: object) -> str:
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as exit:
            main(["convert", *map(str, arguments)])
        assert exit.value.code == 2
        assert contents(tmp_path) == before
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("megatron-aspo: error: ")
        return line.removeprefix("megatron-aspo: error: ")

    return run


def contents(directory: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(directory.rglob("*"))}
