"""The agent: the process that waits in a sandbox and forks a child for each execution. Standard library only; the host's side is
`sandbox.py`.

The host sends lines of JSON over a socket, which is standard input at the start: first `{"sources": {…}, "limits": {…}}`, then for each
execution `{"mode": …, "cpu_s": …}` with three pipes attached, the child's standard streams. When the child has ended, the agent kills
everything it left running and replies `{"status": …, "cpu_s": …}`. A program can take over the agent but gains little: the limits of
memory, processes and wall-clock time still hold, and no verdict is read from the reply. Modes:

- `stdin`: the program runs as `__main__` on its streams, like a plain Python process in every respect.
- `calls`: the program is a module whose functions the host calls; see `calls.py`.
- `asserts`: test code runs, and the functions under test are proxies of those in another sandbox; see `asserts.py`.
"""

import _socket  # socket itself takes 6 ms to import
import atexit
import builtins
import contextlib
import gc
import importlib
import json
import os
import re
import resource
import signal
import sys

PROGRAM = os.environ["TMPDIR"] + "/program.py"
DESCRIPTOR_BYTES = 4
PR_SET_CHILD_SUBREAPER = 36
IMPORTED_AHEAD = (
    *("array", "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "fractions", "functools", "heapq", "io", "itertools"),
    *("json", "math", "numpy", "operator", "os", "queue", "random", "re", "statistics", "string", "threading", "time", "typing"),
)
"""Modules imported once for all tests of a program that names them: their import has no effect visible to a program."""


def main() -> None:
    """Answer the host until it closes the socket. In a child of mode `stdin`, run the program."""
    os.closerange(3, 3 + 64)  # descriptors that bubblewrap or a worker may have left open
    code = _wait_for_program()
    try:
        exec(code, sys.modules["__main__"].__dict__)
    except BaseException:
        gc.unfreeze()
        raise
    _end()


def _wait_for_program():
    """Return the code to execute as `__main__`, only in a child."""
    _prepare_interpreter()
    control = _socket.socket(fileno=os.dup(0))
    control.sendall(b'{"ready": true}\n')
    sources, received, descriptors = {}, b"", []
    while True:
        data, attached, _, _ = control.recvmsg(1 << 16, _socket.CMSG_SPACE(3 * DESCRIPTOR_BYTES))
        if not data:
            os._exit(0)
        received += data
        descriptors += [number for _, _, content in attached for number in memoryview(content).cast("i")]
        while b"\n" in received:
            line, _, received = received.partition(b"\n")
            command = json.loads(line)
            if "sources" in command:
                sources = command["sources"]
                _import_ahead(sources)
                _set_limits(command["limits"])
                continue
            child = os.fork()
            if child == 0:
                return _begin(command, sources, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            descriptors = []
            control.sendall(json.dumps(_wait(child)).encode() + b"\n")


def _prepare_interpreter() -> None:
    if os.environ.pop("SANDBOX_ADOPTS_ORPHANS", ""):  # without a PID namespace, adopting orphans lets the host find them
        import ctypes  # takes 10 ms

        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    import _sitebuiltins  # adds what the module site would, which is left out because it is slow

    builtins.exit = _sitebuiltins.Quitter("exit", "Ctrl-D (i.e. EOF)")
    builtins.quit = _sitebuiltins.Quitter("quit", "Ctrl-D (i.e. EOF)")
    # Imported here, so that each child has them and needs none of these files any more.
    import asserts  # noqa: F401
    import calls  # noqa: F401
    import prelude  # noqa: F401

    sys.path.remove(os.environ.pop("PYTHONPATH"))
    sys.path += [path for path in os.environ.pop("SANDBOX_MODULES", "").split(":") if path]
    sys.argv = [PROGRAM]


def _import_ahead(sources: dict) -> None:
    text = "\n".join(sources.values())
    for name in sorted(set(re.findall(r"^[ \t]*(?:import|from)[ \t]+(\w+)", text, re.MULTILINE)).intersection(IMPORTED_AHEAD)):
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # the program will get the same error
    if "program" in sources:
        with open(PROGRAM, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(sources["program"])
    gc.collect()
    gc.freeze()  # a child's collections skip everything that exists already


def _set_limits(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _wait(child: int) -> dict:
    _, status, usage = os.wait4(child, 0)
    # In its own PID namespace this process is number 2, which elsewhere is the kernel's.
    if os.getpid() == 2 and os.getppid() == 1:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # everything left in the namespace, except the first process and this one
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    return {"status": os.waitstatus_to_exitcode(status), "cpu_s": usage.ru_utime + usage.ru_stime}


def _begin(command: dict, sources: dict, descriptors: list[int]):
    """Turn this child into the program's process. Return the code to execute as `__main__`, only for mode `stdin`."""
    os.setsid()
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    os.closerange(3, 3 + 64)
    # SIGXCPU comes first, and identifies the limit; SIGKILL follows a second later, for a program that ignores it.
    resource.setrlimit(resource.RLIMIT_CPU, (command["cpu_s"], command["cpu_s"] + 1))
    mode = command["mode"]
    if mode != "stdin":
        requests, results = os.dup(0), os.dup(1)
        for target, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY)):
            null = os.open("/dev/null", flags)
            os.dup2(null, target)
            os.close(null)
    _open_streams()
    if mode == "stdin":
        return _main_code(sources["program"])
    import asserts
    import calls

    with open(requests, "rb") as lines:
        if mode == "calls":
            calls.serve(sources["program"], lines, results)
        else:
            asserts.run(sources, lines, results)
    os._exit(0)


def _end() -> None:
    """End the process of a program that has finished, in the order of the interpreter's own shutdown, but without tearing down all modules:
    that takes 3 ms, more than many programs. An exception, including SystemExit, takes the interpreter's full path.
    """
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    status = _flush(sys.stdout, sys.stderr)
    namespace = sys.modules["__main__"].__dict__
    for hidden in (True, False):  # drop the program's objects, whose destructors may print
        for name in [name for name in namespace if name.startswith("_") is hidden and name != "__builtins__"]:
            namespace[name] = None
    gc.collect()
    os._exit(_flush(sys.__stdout__, sys.__stderr__) or status)


def _flush(*streams) -> int:
    """Flush the streams; return the resulting exit status."""
    status = 0
    for stream in streams:
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except Exception:
            status = 120
    return status


def _open_streams() -> None:
    """Reopen the standard streams on the current descriptors."""
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115


def _main_code(source: str):
    import prelude

    code = compile(source, PROGRAM, "exec", dont_inherit=True)
    namespace = sys.modules["__main__"].__dict__
    namespace["__file__"] = PROGRAM
    prelude.add_missing_names(namespace, code)
    for name in ("agent", "asserts", "calls", "plain", "prelude"):
        sys.modules.pop(name, None)
    return code
