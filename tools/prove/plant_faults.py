"""Plant the faults of tools/prove/planted_faults.yaml one at a time and report which of them the tests near them catch:

    python tools/prove/plant_faults.py

Each fault is planted in a throw-away copy of the checkout; the checkout itself is never changed. One line per fault, beginning with

caught   a test failed, the tests ran longer than --limit, or their process died of a signal; the line says which
missed   all tests passed
broken   the old text is not found exactly once, the tests fail without the fault (--check-clean), or pytest could not run them

and one JSON object as the last line: {"faults": …, "caught": …, "missed": […], "broken": […], "seconds": …}.
Status 0: every fault is caught. Status 1: one is missed or broken. Status 2: nothing was planted.
"""

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_aspo.common.process_tree import mapped_segments, unlink  # noqa: E402

FAULTS = "tools/prove/planted_faults.yaml"
LINKED = (".venv", "models")
"""Large directories that git ignores and tests read; a copy has links to those of the checkout."""
_TESTS_FAILED = 1
"""pytest's status. The others above 0 say that it could not run the tests."""
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Fault:
    """One fault, and the tests that must notice it."""

    name: str
    file: str
    """Relative to the root of the checkout."""
    old: str
    """Text that occurs exactly once in the file."""
    new: str
    """The replacement."""
    tests: tuple[str, ...]
    """pytest's ids of test files or tests, relative to the root."""

    def plant(self, root: Path) -> None:
        """Change the file below `root`. Raises ValueError unless the old text occurs exactly once."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"the old text is {found} times in {self.file}")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


def read_faults(path: Path) -> list[Fault]:
    """Return the faults listed in a YAML file. Raises ValueError for an entry with other fields or a duplicate name."""
    faults = []
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        if set(entry) != set(Fault.__dataclass_fields__):
            raise ValueError(f"{path.name}: an entry has {', '.join(Fault.__dataclass_fields__)}, not {', '.join(entry)}")
        faults.append(Fault(**entry | {"tests": tuple(entry["tests"])}))
    names = [fault.name for fault in faults]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path.name}: listed twice: {', '.join(sorted(twice))}")
    return faults


@contextmanager
def copy_of(root: Path) -> Iterator[Path]:
    """Yield a copy of the checkout's files that git does not ignore, in a new directory that is removed afterwards."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True, check=True
    )
    scratch = Path(tempfile.mkdtemp(prefix="faults-"))
    # Where tests run as root, sandboxed programs run as nobody and must find the package.
    scratch.chmod(0o755)
    try:
        copy = scratch / "checkout"
        (scratch / "tmp").mkdir()
        for name in filter(None, os.fsdecode(listed.stdout).split("\0")):
            if name not in LINKED and (root / name).is_file():  # else deleted, and not committed yet
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, copy / name)
        for name in LINKED:
            if (root / name).exists():
                (copy / name).symlink_to((root / name).resolve())
        yield copy
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True)
class Outcome:
    """The result of a pytest process."""

    status: int | None
    """Exit status, minus the signal's number if a signal killed it; None if it ran out of time."""
    failed: tuple[str, ...]
    """Ids of the tests that failed."""
    output: str


def run_tests(copy: Path, tests: Sequence[str], limit_s: float, *options: str) -> Outcome:
    """Run tests of a copy, with its package, and end every process that they leave."""
    environment = os.environ | {
        "PYTHONPATH": str(copy),  # takes precedence over an installed package, in child processes and Ray's workers too
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(copy.parent / "tmp"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not nightly and not gpu", "-p", "no:cacheprovider", *options, *tests]
    with (copy.parent / "output").open("w+b") as output:
        process = subprocess.Popen(command, cwd=copy, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_descendants()
        output.seek(0)
        text = output.read().decode(errors="replace")
    summary = text.rpartition("short test summary info")[2].splitlines()
    failed = [line.split(" ", 1)[1].split(" - ")[0] for line in summary if line.startswith(("FAILED ", "ERROR "))]
    return Outcome(status, tuple(failed), text)


def end_descendants() -> None:
    """Kill every descendant of this process, and unlink the shared memory that they have mapped."""
    # Orphans have become children of this process (PR_SET_CHILD_SUBREAPER). A process that is being started shows up in the next round.
    while family := psutil.Process().children(recursive=True):
        segments = mapped_segments(family)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=5.0)
        unlink(segments)


def try_fault(fault: Fault, root: Path, limit_s: float) -> tuple[str, str]:
    """Plant one fault and run its tests; return `caught`, `missed` or `broken`, and the reason."""
    with copy_of(root) as copy:
        try:
            fault.plant(copy)
        except (ValueError, OSError) as error:
            return "broken", str(error)
        outcome = run_tests(copy, fault.tests, limit_s, "-x")
    if outcome.status is None:
        return "caught", f"the tests ran longer than {limit_s:g} s"
    if outcome.status < 0:
        return "caught", f"the tests' process died of {signal.strsignal(-outcome.status)}"
    if outcome.status == _TESTS_FAILED:
        return "caught", ", ".join(outcome.failed)
    if outcome.status == 0:
        return "missed", ", ".join(fault.tests)
    return "broken", f"pytest ended with status {outcome.status}: {_last_words(outcome.output)}"


def failing_without_a_fault(faults: Sequence[Fault], root: Path, limit_s: float) -> dict[str, str]:
    """Run the tests of all faults once on an unchanged copy; return fault → failing test. Raises SystemExit if they cannot run."""
    tests = list(dict.fromkeys(test for fault in faults for test in fault.tests))
    with copy_of(root) as copy:
        outcome = run_tests(copy, tests, limit_s * len(tests))
    if outcome.status not in (0, _TESTS_FAILED):
        raise _refusal(f"the tests do not run without a fault: {_last_words(outcome.output)}")
    failing = {}
    for fault in faults:
        if found := [failed for failed in outcome.failed if any(_is_part_of(failed, test) for test in fault.tests)]:
            failing[fault.name] = found[0]
    return failing


def _is_part_of(failed: str, test: str) -> bool:
    return failed == test or failed.startswith((f"{test}::", f"{test}["))


def _is_selected(fault: Fault, word: str) -> bool:
    return fault.name == word or any(test.startswith(word) for test in fault.tests)


def _last_words(output: str) -> str:
    return " | ".join(output.strip().splitlines()[-3:])


def _refusal(message: str) -> SystemExit:
    print(f"error: {message}", file=sys.stderr)
    return SystemExit(2)


def _terminate(number: int, frame) -> None:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults; or those with tests below a path, such as tests/e2e")
    parser.add_argument("--check-clean", action="store_true", help="first run the tests once without a fault")
    parser.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="limit for the tests of one fault (default: 300)")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout, with its own list")
    options = parser.parse_args(argv)
    root = options.root.resolve()
    try:
        faults = everything = read_faults(root / FAULTS)
    except (OSError, ValueError) as error:
        raise _refusal(str(error)) from error
    if options.only:
        faults = [fault for fault in everything if any(_is_selected(fault, word) for word in options.only)]
        if unknown := [word for word in options.only if not any(_is_selected(fault, word) for fault in everything)]:
            raise _refusal(f"--only: no fault is named, and no test begins with, {unknown[0]}")

    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts it in the background ignores it
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    started = time.monotonic()
    failing = failing_without_a_fault(faults, root, options.limit) if options.check_clean else {}
    ended: dict[str, str] = {}
    for fault in faults:
        began = time.monotonic()
        if fault.name in failing:
            state, why = "broken", f"fails without the fault: {failing[fault.name]}"
        else:
            state, why = try_fault(fault, root, options.limit)
        ended[fault.name] = state
        print(f"{state:<8} {fault.name} ({time.monotonic() - began:.0f} s): {why}", flush=True)
    names = {state: [name for name, found in ended.items() if found == state] for state in ("caught", "missed", "broken")}
    counts = {"faults": len(faults), "caught": len(names["caught"]), "missed": names["missed"], "broken": names["broken"]}
    print(json.dumps(counts | {"seconds": round(time.monotonic() - started)}, ensure_ascii=False))
    return int(bool(names["missed"] or names["broken"]))


if __name__ == "__main__":
    sys.exit(main())
