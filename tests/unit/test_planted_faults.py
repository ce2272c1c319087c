"""Every listed fault can be planted, and the tool reports its results and cleans up after itself."""

import ast
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "prove" / "plant_faults.py"
sys.path.append(str(ROOT / "tools" / "prove"))
tool = importlib.import_module("plant_faults")
FAULTS = tool.read_faults(ROOT / tool.FAULTS)
ROOMS = sorted(path.name for path in (ROOT / "megatron_aspo").iterdir() if any(path.glob("*.py")))


def room_of(fault) -> str:
    """Return a folder of the package, `megatron_aspo` for the files beside the folders, or a folder at the top such as `tools`."""
    first, *others = Path(fault.file).parts
    return others[0] if first == "megatron_aspo" and len(others) > 1 else first


def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_changes_a_valid_file_once_and_names_existing_tests(fault):
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1 and fault.new != fault.old
    if fault.file.endswith(".py"):
        before, after = (ast.dump(ast.parse(source)) for source in (text, text.replace(fault.old, fault.new)))
        assert before != after, "it changes nothing but comments or spaces"
    assert fault.tests
    for test in fault.tests:
        file, _, name = test.partition("[")[0].partition("::")
        found = names_in(file)
        assert file.startswith("tests/") and found and name in {"", *found}, test


def test_every_folder_has_faults_and_few_of_them_need_whole_runs():
    assert len(FAULTS) >= 60
    rooms = [room_of(fault) for fault in FAULTS]
    assert {room: rooms.count(room) for room in [*ROOMS, "megatron_aspo", "tools"] if rooms.count(room) < 2} == {}
    assert sum(any(test.startswith("tests/e2e") for test in fault.tests) for fault in FAULTS) <= 12


LASTING = 1_000_000 + os.getpid()
"""Seconds that a process of the tests sleeps, which would outlive them; also its mark."""
SOURCE = """
import subprocess

def double(number):
    return 2 * number

def wait():
    subprocess.run(["true"])
"""
TESTS = """
from sizes import double, wait

def test_double():
    assert double(3) == 6

def test_wait():
    wait()

def test_that_fails_anyway():
    assert False
"""


def fault(name: str, old: str, new: str, test: str) -> dict:
    return {"name": name, "file": "sizes.py", "old": old, "new": new, "tests": [f"tests/test_sizes.py::{test}"]}


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Make a repository of one module and its tests; one of its faults starts a process that would outlive the tests."""
    lasting = f'subprocess.run(["sleep", "{LASTING}"], start_new_session=True)'
    faults = [
        fault("triples", "2 * number", "3 * number", "test_double"),
        fault("is not tested", '["true"]', '["echo"]', "test_wait"),
        fault("is not there", "4 * number", "5 * number", "test_double"),
        fault("is tested by what fails", "2 * number", "3 * number", "test_that_fails_anyway"),
        fault("hangs", 'subprocess.run(["true"])', lasting, "test_wait"),
    ]
    root = tmp_path / "checkout"
    (root / "tests").mkdir(parents=True)
    (root / "tools" / "prove").mkdir(parents=True)
    (root / "sizes.py").write_text(SOURCE)
    (root / "tests" / "test_sizes.py").write_text(TESTS)
    (root / tool.FAULTS).write_text(yaml.safe_dump(faults))
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    return root


def start(checkout: Path, *options: str) -> subprocess.Popen:
    scratch = checkout.parent / "scratch"
    scratch.mkdir()
    command = [sys.executable, str(TOOL), "--root", str(checkout), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(scratch)})


def left_behind(checkout: Path) -> list[str]:
    """Return files of the tool, and processes that its tests started."""
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [*os.listdir(checkout.parent / "scratch"), *(command for command in commands if command == f"sleep {LASTING}")]


def test_caught_missed_and_broken_faults_are_reported_as_such(checkout):
    chosen = ("triples", "is not tested", "is not there", "is tested by what fails")
    process = start(checkout, "--check-clean", "--only", *chosen)
    *lines, last = process.communicate()[0].splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "caught   triples",
        "missed   is not tested",
        "broken   is not there",
        "broken   is tested by what fails",
    ]
    assert lines[0].endswith("tests/test_sizes.py::test_double") and "the old text is 0 times in sizes.py" in lines[2]
    assert "fails without the fault: tests/test_sizes.py::test_that_fails_anyway" in lines[3]
    found = json.loads(last)
    assert found.pop("seconds") >= 0
    assert found == {"faults": 4, "caught": 1, "missed": ["is not tested"], "broken": ["is not there", "is tested by what fails"]}
    assert process.returncode == 1 and left_behind(checkout) == []
    assert (checkout / "sizes.py").read_text() == SOURCE


def test_all_caught_is_status_0(checkout):
    process = start(checkout, "--only", "triples")
    assert json.loads(process.communicate()[0].splitlines()[-1])["caught"] == 1 and process.returncode == 0


def test_hanging_tests_are_killed_with_their_processes_and_count_as_caught(checkout):
    process = start(checkout, "--only", "hangs", "--limit", "8")
    line, last = process.communicate()[0].splitlines()
    assert line.startswith("caught   hangs (") and line.endswith("the tests ran longer than 8 s")
    assert json.loads(last)["caught"] == 1 and process.returncode == 0 and left_behind(checkout) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_behind(checkout, number):
    process = start(checkout, "--only", "hangs")
    while f"sleep {LASTING}" not in left_behind(checkout):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate()
    assert process.returncode not in (0, 1, 2) and left_behind(checkout) == []


def test_a_name_that_is_not_in_the_list_is_refused(checkout):
    process = start(checkout, "--only", "triples", "nothing")
    assert process.communicate()[0] == "" and process.returncode == 2


def test_an_entry_with_an_unknown_field_and_a_duplicate_name_are_refused(tmp_path):
    entry = fault("a", "b", "c", "d")
    for entries, message in (([entry | {"why": "so"}], "an entry has name, file"), ([entry, entry], "listed twice: a")):
        (tmp_path / "faults.yaml").write_text(yaml.safe_dump(entries))
        with pytest.raises(ValueError, match=message):
            tool.read_faults(tmp_path / "faults.yaml")
