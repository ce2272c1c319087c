"""tools/setup_env.sh and bubblewrap: the path of its log, and that a failed installation is not repeated."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root installs")
def test_a_failed_installation_of_bubblewrap_is_not_repeated_and_its_log_is_not_in_tmp(tmp_path):
    programs, checkout = tmp_path / "programs", tmp_path / "checkout"
    programs.mkdir()
    for directory in os.defpath.split(":"):
        for path in Path(directory).iterdir():
            if path.name not in ("bwrap", "apt-get") and not (programs / path.name).exists():
                (programs / path.name).symlink_to(path)
    calls = tmp_path / "calls"
    executables = {
        programs / "apt-get": f"#!/bin/sh\necho called >>{calls}\necho no network\nexit 100\n",
        checkout / ".venv/bin/python": "#!/bin/sh\necho Python 3.11.0\n",
        checkout / ".venv/bin/megatron-aspo": "#!/bin/sh\n",
    }
    for name in ("setup.py", "tools/setup_env.sh", "tools/locks/cpu-py311.txt"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    for path, text in executables.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    made_from = '{ .venv/bin/python --version && echo "$PWD" && cat tools/locks/cpu-py311.txt setup.py tools/setup_env.sh; } | sha256sum'
    subprocess.run(["bash", "-c", f"{made_from} >.venv/setup.stamp"], cwd=checkout, check=True)

    environment = {"PATH": str(programs), "TMPDIR": str(tmp_path / "nowhere")}
    errors = []
    for _ in range(2):
        result = subprocess.run(["bash", "tools/setup_env.sh"], cwd=checkout, env=environment, capture_output=True, text=True, check=True)
        errors.append(result.stderr)
    assert len(calls.read_text().splitlines()) == 2  # apt-get install, then apt-get update, which failed too
    assert "no network" in (checkout / ".venv/bubblewrap.log").read_text()
    assert "could not be installed" in errors[0] and "could not be installed" not in errors[1]
    assert all("the code reward needs bubblewrap" in error for error in errors)
