"""A command's `main`, called in this process.

A new Python takes seconds to import torch, and most claims about a command are not about its process.
"""

import contextlib
import io
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def run_main(main: Callable[[], None], *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Call `main` with these words on its command line, from the directory `cwd`; return status, stdout and stderr.

    Afterwards the signal handlers, `sys.path` and the working directory are restored, and modules in `cwd` are forgotten.
    """
    words = [*map(str, arguments)]
    cwd = Path(cwd).absolute()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    path, argv, status = [*sys.path], sys.argv, 0
    sys.argv = ["command", *words]
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                main()
            except SystemExit as ended:
                status = ended.code or 0
    finally:
        sys.argv, sys.path[:] = argv, path
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name, module in [*sys.modules.items()]:
            if Path(getattr(module, "__file__", None) or "").parent == cwd:
                del sys.modules[name]
    return subprocess.CompletedProcess(words, status, out.getvalue(), errors.getvalue())
