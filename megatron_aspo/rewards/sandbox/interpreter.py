"""The files of this machine that a sandbox sees: the interpreter, its standard library, their shared libraries, and promised packages."""

import importlib.util
import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from megatron_aspo.common.errors import UserError

AGENT = Path(__file__).parent / "inside"
AGENT_INSIDE = "/agent"
MODULES_INSIDE = "/modules"
_UNUSED_EXTENSIONS = ("_tkinter", "readline", "_curses", "_curses_panel", "nis", "_dbm", "_gdbm", "_crypt", "spwd", "ossaudiodev")
"""Extension modules whose libraries (28 on Debian) are left out, because each file costs a mount in every sandbox."""


@dataclass(frozen=True)
class Interpreter:
    """The interpreter of a sandbox and the files that it may read."""

    executable: str
    """Its path, the same inside and outside."""
    files: tuple[tuple[str, str], ...]
    """(path outside, path inside) of files and directories, all bound read-only."""


def find_interpreter(modules: list[str], paths: list[str] | None = None) -> Interpreter:
    """Return the base interpreter of this virtual environment, with the packages and paths that sandboxed programs may read.

    Raises UserError for a module that is not installed here, and a path that does not exist or is not absolute.
    """
    executable = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}").resolve()
    if not executable.exists():
        raise UserError(f"the code sandbox finds no interpreter at {executable}; install Python with its executable there")
    library = Path(sysconfig.get_path("stdlib"))
    binaries = [executable, *(library / "lib-dynload").glob("*.so")]
    binaries = [path for path in binaries if path.name.partition(".")[0] not in _UNUSED_EXTENSIONS]
    files = [(str(executable), str(executable)), (str(library), str(library)), (str(AGENT), AGENT_INSIDE)]
    for module in modules:
        for path in _package_paths(module):
            files.append((str(path), f"{MODULES_INSIDE}/{path.name}"))
            binaries += path.rglob("*.so*") if path.is_dir() else ()
    for name in paths or ():
        if not Path(name).is_absolute() or not Path(name).exists():
            raise UserError(f"the sandbox's path {name} is not an existing absolute path; correct it")
        files.append((name, name))
    return Interpreter(str(executable), (*files, *((path, path) for path in _shared_libraries(binaries))))


def _package_paths(module: str) -> list[Path]:
    """Return the module's file or package directory, and the libraries bundled with its wheel."""
    try:
        spec = importlib.util.find_spec(module) if module.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or spec.origin == "built-in":
        raise UserError(f"the module {module}, promised to programs, is not installed here; install it, or take it off modules")
    origin = Path(spec.origin)
    package = origin.parent if spec.submodule_search_locations else origin
    return [path for path in (package, package.with_name(f"{module}.libs")) if path.exists()]


def _shared_libraries(binaries: list[Path]) -> list[str]:
    """Return the libraries that the binaries load, including the dynamic loader, except those in directories that are bound anyway."""
    try:
        result = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError("the code sandbox needs ldd; install it (apt install libc-bin, dnf install glibc-common)") from error
    found = set(re.findall(r"^\s+(?:\S+ => )?(/\S+) \(0x", result.stdout, re.MULTILINE))
    inside = {str(path.parent) for path in binaries[1:]}
    return sorted(path for path in found if str(Path(path).parent) not in inside)
