"""Mutation test of megatron_aspo/losses/: do the unit tests notice a fault in one place of a loss? python tools/prove/mutate_losses.py

Each mutant is the package with one fault in it; tools/prove/mutants.py defines them. A mutant is killed if a test fails under it, or if the
tests take ten times as long. One that passes all tests has survived: either the tests have a hole, or it is equivalent to the original.
tools/prove/mutants_equivalent.yaml lists the equivalent ones, each with the reason; --print-survivors writes entries for it.

Status 0: every survivor is listed, at least 95 % of all mutants are killed, and the list names nothing but survivors. The last two are
required only of the whole set, not of a part (--only, --function, --sample). Status 1: one of these fails. Status 2: nothing was tried.

The files of losses/ are read once, at the start; the tests are read again for every mutant and should not change meanwhile. Tests see a
mutant in their own process and in its forks, but not in a new Python that they start.
"""

import argparse
import ast
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import yaml
from mutants import Key, Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
LOSSES = "megatron_aspo/losses"
TESTS = ["tests/unit/test_losses*.py", "tests/unit/test_config.py"]
EQUIVALENT = "tools/prove/mutants_equivalent.yaml"
KILLED_AT_LEAST = 0.95
FORK = multiprocessing.get_context("fork")


def _refusal(message: str) -> SystemExit:
    # Python's own status for a message is 1, which here means that the tests are too weak.
    print(f"error: {message}", file=sys.stderr)
    return SystemExit(2)


class _TreeLoader(SourceFileLoader):
    """Loads a module from the given tree instead of its file's text, and never from a .pyc."""

    def __init__(self, name: str, path: str, tree: ast.Module):
        super().__init__(name, path)
        self.tree = tree

    def get_code(self, fullname: str):
        return compile(self.tree, self.path, "exec", dont_inherit=True)


class _Order:
    """Pytest plugin that runs the cheapest tests first, and records each test's seconds and which one failed."""

    def __init__(self, cost: Mapping[str, float]):
        self.cost = cost
        self.seconds: Counter[str] = Counter()
        self.failed: str | None = None

    def pytest_collection_modifyitems(self, items: list) -> None:
        items.sort(key=lambda item: self.cost.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report) -> None:
        self.seconds[report.nodeid] += report.duration
        self.failed = report.nodeid if report.failed else self.failed


class Result(NamedTuple):
    """The outcome of one process."""

    status: int
    """Pytest's exit status, or -1 for a process that did not finish."""
    failed: str | None = None
    """The test, if one failed."""
    seconds: Mapping[str, float] = {}
    """Seconds of each test."""
    modules: Sequence[str] = ()
    """Names of the imported modules."""


class Suite:
    """The tests of a repository, run in forked processes in which losses/ comes from syntax trees.

    A fork starts with what this process has imported: PyTorch and the rest (`preload`), and nothing of the repository.
    """

    def __init__(self, root: Path, tests: Sequence[str], trees: dict[str, ast.Module]):
        self.root = root
        self.tests = tests
        self.trees = trees
        """By path relative to losses/."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        """Find a module of losses/, by the protocol of sys.meta_path."""
        package, _, module = name.rpartition(LOSSES.replace("/", ".") + ".")
        for file in (f"{module.replace('.', '/')}.py", f"{module.replace('.', '/')}/__init__.py"):
            if module and not package and file in self.trees:
                at = str(self.root / LOSSES / file)
                return spec_from_file_location(name, at, loader=_TreeLoader(name, at, self.trees[file]))
        return None

    def start(self, mutant: Mutant | None, cost: Mapping[str, float], *options: str, log: int | None = None):
        """Start a process that runs the tests, cheapest first; return it and the connection for its Result. `log`: output descriptor."""
        ours, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=self._run, args=(mutant, cost, options, log, theirs))
        process.start()
        theirs.close()
        return process, ours

    def _run(self, mutant: Mutant | None, cost: Mapping[str, float], options: Sequence[str], log: int | None, result) -> None:
        os.setpgrp()  # so that `_stop` also ends what tests start
        log = os.open(os.devnull, os.O_WRONLY) if log is None else log
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            import hypothesis
            import pytest

            if mutant:
                mutant.apply()
            sys.meta_path.insert(0, self)
            # The same examples every time, and no time spent on shrinking them.
            phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.target)
            settings = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
            hypothesis.settings.register_profile("mutants", phases=phases, **settings)
            flags = ("-x", "-q", "--tb=short", "--assert=plain", "-m", "not gpu", "-p", "no:cacheprovider", "--hypothesis-profile=mutants")
            order = _Order(cost)
            status = pytest.main([*flags, f"--rootdir={self.root}", *options, *self.tests], plugins=[order])
            result.send(Result(int(status), order.failed, dict(order.seconds), list(sys.modules)))
        finally:
            os._exit(0)

    def run(self, *options: str, log: int | None = None) -> Result:
        """Run the tests without a mutant."""
        process, connection = self.start(None, {}, *options, log=log)
        result = _receive(connection)
        process.join()
        return result

    def preload(self) -> None:
        """Import here what the tests import from other packages, and nothing of the repository: every mutant must import it again."""
        for name in self.run("--collect-only").modules:
            top = name.partition(".")[0]
            if not (self.root / top).exists() and not (self.root / f"{top}.py").exists():
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        gc.freeze()  # forks need not search these objects for garbage
        if own := [name for name in sys.modules if name.startswith("megatron_aspo")]:
            raise _refusal(f"imported before the first mutant: {', '.join(own)}")

    def outcomes(self, chosen: Sequence[Mutant], seconds: Mapping[str, float], jobs: int, limit: float) -> Iterator[tuple[Mutant, str]]:
        """Yield each mutant with `survived`, `killed` or `timeout`, in order of completion. `seconds`: the time of each test.

        Quick tests run first, and so do those that killed other mutants of the same function: most mutants meet few tests.
        """
        todo = iter(chosen)
        kills: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        running = {}
        try:
            while True:
                while len(running) < jobs and (mutant := next(todo, None)):
                    killers = kills[mutant.key[:2]]
                    process, connection = self.start(mutant, {test: took / (1 + killers[test]) for test, took in seconds.items()})
                    running[connection] = process, mutant, time.monotonic() + limit
                if not running:
                    return
                first = min(deadline for _, _, deadline in running.values())
                ended = wait(running, max(0.0, first - time.monotonic()))
                late = [connection for connection, (_, _, deadline) in running.items() if time.monotonic() > deadline]
                for connection in {*ended, *late}:
                    process, mutant, _ = running.pop(connection)
                    if connection in ended:
                        result = _receive(connection)
                        kills[mutant.key[:2]][result.failed] += 1
                        outcome = "killed" if result.status else "survived"
                    else:
                        _stop(process)
                        connection.close()
                        outcome = "timeout"
                    process.join()
                    yield mutant, outcome
        finally:
            for process, _, _ in running.values():
                _stop(process)


def _receive(connection) -> Result:
    with connection:
        try:
            return connection.recv()
        except EOFError:
            return Result(-1)


def _stop(process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # in case it has no group of its own yet


def read_equivalent(path: Path) -> dict[Key, str]:
    """Return the listed mutants and their reasons. Raises SystemExit for an incomplete or duplicate entry."""
    entries = yaml.safe_load(path.read_text()) or [] if path.exists() else []
    listed = {}
    for entry in entries:
        if set(entry) != {*Key._fields, "reason"} or not all(isinstance(value, str) and value.strip() for value in entry.values()):
            raise _refusal(f"{path.name}: an entry has {', '.join(Key._fields)} and reason, all of them text: {entry}")
        key = Key(*(entry[name] for name in Key._fields))
        if key in listed:
            raise _refusal(f"{path.name}: listed twice: {entry}")
        listed[key] = entry["reason"]
    return listed


def entries_for(keys: Sequence[Key]) -> str:
    entries = [key._asdict() | {"reason": ""} for key in keys]
    return "\n".join(yaml.safe_dump([entry], sort_keys=False, allow_unicode=True, width=10_000) for entry in entries)


def table(chosen: Sequence[Mutant], ended: dict[Key, str], listed: dict[Key, str]) -> str:
    columns = ("mutants", "killed", "of these timeout", "survived", "of these equivalent")
    rows: dict[str, Counter] = {}
    for mutant in chosen:
        outcome = ended[mutant.key]
        for name in (mutant.key.file, "all"):
            row = rows.setdefault(name, Counter())
            row["mutants"] += 1
            row["survived" if outcome == "survived" else "killed"] += 1
            row["of these timeout"] += outcome == "timeout"
            row["of these equivalent"] += outcome == "survived" and mutant.key in listed
    rows["all"] = rows.pop("all")
    lines = ["".ljust(16) + "  ".join(columns)]
    lines += [name.ljust(16) + "  ".join(str(row[column]).rjust(len(column)) for column in columns) for name, row in rows.items()]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tests", nargs="+", default=TESTS, help=f"test files or patterns, relative to the root (default: {' '.join(TESTS)})"
    )
    parser.add_argument("--only", metavar="FILES", help="files of losses/, separated by commas")
    parser.add_argument("--function", metavar="NAME", help="one function or class, with its contents")
    parser.add_argument("--sample", metavar="N", type=int, help="try N mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of --sample")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--print-survivors", action="store_true", help=f"print unlisted survivors as entries for {EQUIVALENT}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time (default: one per CPU)")
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, help="limit for one mutant (default: ten times the tests' own time, at least 60)"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout to test, such as one that is not edited meanwhile")
    return parser.parse_args(argv)


def select(everything: Sequence[Mutant], options: argparse.Namespace) -> list[Mutant]:
    chosen = list(everything)
    if options.only:
        files = set(options.only.split(","))
        if unknown := files - {mutant.key.file for mutant in chosen}:
            raise _refusal(f"--only: no mutants in {', '.join(sorted(unknown))}")
        chosen = [mutant for mutant in chosen if mutant.key.file in files]
    if options.function:
        chosen = [mutant for mutant in chosen if f"{mutant.key.function}.".startswith(f"{options.function}.")]
    if options.sample is not None and options.sample < len(chosen):
        kept = set(random.Random(options.seed).sample(range(len(chosen)), options.sample))
        chosen = [mutant for i, mutant in enumerate(chosen) if i in kept]
    if not chosen:
        raise _refusal("no mutant is chosen")
    return chosen


def measure(suite: Suite, chosen: Sequence[Mutant], listed: dict[Key, str], jobs: int, timeout: float | None) -> dict[Key, str]:
    """Return the outcome of each mutant. Prints unlisted survivors as they are found."""
    suite.preload()
    began = time.monotonic()
    unchanged = suite.run(log=sys.stderr.fileno())
    if unchanged.status:
        raise _refusal("the tests fail without any mutant")
    limit = timeout or max(60.0, 10 * (time.monotonic() - began))
    began = time.monotonic()
    ended: dict[Key, str] = {}
    for mutant, outcome in suite.outcomes(chosen, unchanged.seconds, jobs, limit):
        ended[mutant.key] = outcome
        if outcome == "survived" and mutant.key not in listed:
            print(f"survived: {mutant}\n{mutant.diff()}", flush=True)
        if len(ended) % 25 == 0 or len(ended) == len(chosen):
            print(f"{len(ended)} of {len(chosen)} mutants, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return ended


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    root = options.root.resolve()
    sources = {str(path.relative_to(root / LOSSES)): path.read_text() for path in sorted((root / LOSSES).rglob("*.py"))}
    trees = {file: ast.parse(source) for file, source in sources.items()}
    everything = [mutant for file, source in sources.items() for mutant in mutants(trees[file], source, file)]
    chosen = select(everything, options)
    if options.list:
        print(*chosen, sep="\n")
        return 0
    listed = read_equivalent(root / EQUIVALENT)
    tests = list(dict.fromkeys(str(path.relative_to(root)) for pattern in options.tests for path in sorted(root.glob(pattern))))
    if not tests:
        raise _refusal(f"no test files match {' '.join(options.tests)}")

    os.chdir(root)
    sys.path.insert(0, str(root))
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as scratch:
        # One thread per process, also in those that tests start; and nothing is written into the repository.
        os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", HYPOTHESIS_STORAGE_DIRECTORY=scratch)
        ended = measure(Suite(root, tests, trees), chosen, listed, options.jobs, options.timeout)

    survivors = [mutant.key for mutant in chosen if ended[mutant.key] == "survived"]
    unlisted = [key for key in survivors if key not in listed]
    whole = len(chosen) == len(everything)
    stale = [key for key in listed if ended.get(key, "gone" if whole else "not tried") not in ("survived", "not tried")]
    for key in stale:
        print(f"stale in {EQUIVALENT} ({ended.get(key, 'no such mutant')}): {' | '.join(key)}")
    if options.print_survivors and unlisted:
        print(entries_for(unlisted))
    print(table(chosen, ended, listed))
    killed = len(chosen) - len(survivors)
    print(json.dumps({"mutants": len(chosen), "killed": killed, "equivalent": len(survivors) - len(unlisted)}))
    return int(bool(unlisted) or (whole and (bool(stale) or killed < KILLED_AT_LEAST * len(chosen))))


if __name__ == "__main__":
    sys.exit(main())
