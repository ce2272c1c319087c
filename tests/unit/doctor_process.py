"""A check of the doctor in another process, so that it has limits, mounts and an environment of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from megatron_aspo.doctor.record import Record

ROOT = Path(__file__).parents[2]


def in_process(expression: str, before: str = "", prefix: tuple[str, ...] = (), prepare=None, **environment: str) -> Record:
    """Return the record of a check that runs in another process, with its own limits and environment."""
    imports = "import json; from megatron_aspo.doctor import files, limits, needs, sandbox, storage, versions; from pathlib import Path"
    code = f"{imports}\n{before}\nprint(json.dumps(vars({expression})))"
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        preexec_fn=prepare,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Record(**json.loads(done.stdout))
