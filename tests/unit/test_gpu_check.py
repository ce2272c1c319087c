"""The prepared check of a GPU: a rehearsal, and its handling of cases that fail, crash or take too long."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools" / "prove"))
check = importlib.import_module("gpu_check")
SECTION = """
import os, subprocess, sys, time

def cases(small):
    yield "good", lambda: {"figure": 1}
    yield "wrong", lambda: {"passed": False}
    yield "raises", lambda: 1 / 0
    yield "crashes", lambda: os.abort()
    yield "skips", lambda: {"passed": None, "skipped": "no card"}
    yield "hangs", hangs
    yield "never", lambda: {}

def hangs():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # child of a hanging case"])
    time.sleep(600)
"""


@pytest.mark.long
def test_every_section_passes_small_on_this_machine():
    command = [sys.executable, str(ROOT / "tools" / "prove" / "gpu_check.py"), "--small"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    *cases, counts = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert result.returncode == 0 and counts["failed"] == 0, (cases, result.stderr[-2000:])
    assert {case["section"] for case in cases} == set(check.BUDGETS)
    assert all(case["passed"] is not None or case["skipped"] for case in cases)
    assert counts["passed"] >= 14


def test_a_case_that_fails_crashes_or_hangs_does_not_stop_the_others(tmp_path, monkeypatch, capfd):
    (tmp_path / "made_up").mkdir()
    (tmp_path / "made_up" / "section.py").write_text(SECTION)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    found = {entry["case"]: entry for entry in check.watch_section("made_up.section", True, 12.0)}
    assert {case: entry["passed"] for case, entry in found.items()} == {
        "good": True,
        "wrong": False,
        "raises": False,
        "crashes": False,
        "skips": None,
        "hangs": False,
    }
    assert found["good"]["figure"] == 1 and "ZeroDivisionError" in found["raises"]["error"]
    assert "ended with status -6" in found["crashes"]["error"] and "budget of 12 s is spent" in found["hangs"]["error"]
    hanging = [
        process for process in psutil.process_iter(["cmdline"]) if "# child of a hanging case" in " ".join(process.info["cmdline"] or [])
    ]
    _, alive = psutil.wait_procs(hanging, timeout=10)  # a killed process may take a moment
    assert not alive
    capfd.readouterr()


RANKS = """
from gpu_sections.workload import new_directory, random_qwen, training_rank

def cases(small):
    directory = new_directory()
    random_qwen(directory, small)

    def rank(fails):
        from megatron_aspo.trainer import rank as module

        build = module.build_optimizer
        module.build_optimizer = (lambda *arguments: 1 / 0) if fails else build
        try:
            with training_rank(directory, small):
                return {}
        finally:
            module.build_optimizer = build

    yield "half built", lambda: rank(True)
    yield "whole", lambda: rank(False)
"""


def test_a_rank_that_fails_half_built_leaves_no_process_group(tmp_path, monkeypatch, capfd):
    (tmp_path / "made_up").mkdir()
    (tmp_path / "made_up" / "ranks.py").write_text(RANKS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    found = {entry["case"]: entry for entry in check.watch_section("made_up.ranks", True, 200.0)}
    assert "ZeroDivisionError" in found["half built"]["error"] and found["whole"]["passed"], found
    capfd.readouterr()


def test_results_are_kept_by_section_and_shown_with_their_versions(tmp_path):
    (tmp_path / "docs").mkdir()
    for page in ("docs/gpu.md", "docs/README.md", "README.md", "docs/gpu_results.json"):
        shutil.copyfile(ROOT / page, tmp_path / page)
    (tmp_path / "docs" / "gpu_results.json").write_text("[]")
    for section, figure in (("speed", 1), ("parking", 2), ("speed", 3)):
        check.write_results([{"section": section, "case": "a", "passed": True, "seconds": 1.0, "figure": figure}], True, "abc", tmp_path)
    entries = json.loads((tmp_path / "docs" / "gpu_results.json").read_text())
    assert [(entry["section"], entry["figure"]) for entry in entries] == [("parking", 2), ("speed", 3)]
    text = (tmp_path / "docs" / "gpu.md").read_text()
    assert "figure 3" in text and "figure 1" not in text and "commit abc" in text and "torch 2." in text
    # A rehearsal is not a card.
    assert "No CUDA code has run on a GPU yet." in text and "Nothing has run on a GPU yet" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("words", [["--small"], []], ids=["small", "no card"])
def test_results_that_are_not_from_a_card_are_not_written(words):
    command = [sys.executable, str(ROOT / "tools" / "prove" / "gpu_check.py"), "environment", "--write", *words]
    before = (ROOT / "docs" / "gpu_results.json").read_text()
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 2 and "what a card shows at full size" in result.stderr and not result.stdout
    assert (ROOT / "docs" / "gpu_results.json").read_text() == before


@pytest.mark.parametrize("words", [["nothing"], ["speed", "sped"]])
def test_an_unknown_section_is_refused(words):
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "prove" / "gpu_check.py"), *words], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2 and "no section" in result.stderr and "parking" in result.stderr
