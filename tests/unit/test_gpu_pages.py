"""The pages on which cases have run on a GPU: current, and with invented results of a card."""

import importlib
import json
import shutil
import sys

import pytest

from tests.unit.test_packaging import ROOT

sys.path.append(str(ROOT / "tools" / "maintain"))
pages = importlib.import_module("make_gpu_pages")
PAGES = ("README.md", "docs/README.md", "docs/gpu.md")
ABOUT = {"card": "NVIDIA H100 80GB HBM3", "commit": "0123456789", "date": "2026-12-01", "small": False, "versions": {"torch": "2.11.0"}}


def entry(section: str, case: str, passed: bool | None = True, **figures) -> dict:
    return {"section": section, "case": case, "passed": passed, "seconds": 1.5, **figures, **ABOUT}


CASES = [
    entry("trainer", "local bfloat16", logprob_error=0.0123456),
    entry("trainer", "transformer_engine bfloat16"),
    entry("trainer", "transformer_engine fp8=e4m3"),
    entry("trainer", "transformer_engine fp8=hybrid", passed=False, error="RuntimeError: a | b\nc"),
    entry("logprobs", "bfloat16", chunk_512_ms=12.5),
    entry("logprobs", "float32"),
    entry("parking", "leave and come back, twice", freed_gb=21.6),
    entry("engines", "engine", passed=None, skipped="vLLM is not installed"),
]


@pytest.fixture
def write(tmp_path):
    """Writes the pages of a copy from these results; returns their texts."""
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        shutil.copyfile(ROOT / page, tmp_path / page)

    def put(entries: list[dict]) -> dict[str, str]:
        (tmp_path / pages.RESULTS).write_text(json.dumps(entries))
        pages.write(tmp_path)
        return {page: (tmp_path / page).read_text(encoding="utf-8") for page in PAGES}

    return put


def test_the_pages_are_current_with_the_committed_results():
    entries = json.loads((ROOT / pages.RESULTS).read_text())
    for page, text in pages.pages(ROOT, entries).items():
        assert page.read_text(encoding="utf-8") == text, "run .venv/bin/python tools/maintain/make_gpu_pages.py"


def test_without_results_the_pages_state_that_nothing_has_run(write):
    texts = write([])
    assert "**Nothing has run on a GPU yet" in texts["README.md"] and "No CUDA code has run on a GPU yet." in texts["docs/gpu.md"]
    _, _, rows = texts["README.md"].partition(pages.TABLE)
    assert rows.split("\n\n")[0].count("| not yet |") == len(pages.STATUS)
    assert sum(line.startswith("- ") for line in texts["docs/README.md"].split(pages.MARK)[1].splitlines()) == len(pages.UNPROVEN)


def test_with_results_the_list_shrinks_and_measurements_appear(write):
    without, texts = write([]), write(CASES)
    gone = set(without["docs/README.md"].splitlines()) - set(texts["docs/README.md"].splitlines())
    assert {line.split(",")[0].split(" (")[0].rstrip(";") for line in gone} == {
        "- the Transformer Engine layer spec with its parameter names",
        "- the Triton kernels of the log-probabilities",
        "- moves to and from pinned memory",
    }
    readme = texts["README.md"]
    assert "**Parts have run on NVIDIA H100 80GB HBM3 ([results](docs/gpu.md#results)), the rest on CPU alone" in readme
    assert "Nothing has run" not in readme and len(readme.splitlines()) == len(without["README.md"].splitlines())
    # One of two FP8 cases failed, vLLM was not installed, and NCCL needs two cards.
    assert "| no | Transformer Engine layers and its fused optimizer: yes; FP8: not yet |" in readme
    assert "| shared memory and gloo | not yet |" in readme
    assert "memory that leaves and comes back: yes; whole runs: not yet |" in readme
    gpu = texts["docs/gpu.md"]
    assert "NVIDIA H100 80GB HBM3, commit 0123456789, 2026-12-01; torch 2.11.0:" in gpu
    assert "| trainer | local bfloat16 | passed | logprob_error 0.0123 |" in gpu
    assert "| trainer | transformer_engine fp8=hybrid | FAILED | error RuntimeError: a \\| b c |" in gpu
    assert "| engines | engine | skipped | skipped vLLM is not installed |" in gpu
    assert write([]) == without


def test_results_of_two_commits_are_separate(write):
    text = write([CASES[0], CASES[4] | {"commit": "fedcba9876"}])["docs/gpu.md"]
    assert text.index("commit 0123456789") < text.index("| trainer |") < text.index("commit fedcba9876") < text.index("| logprobs |")


def test_a_page_without_its_marks_is_refused(write, tmp_path):
    page = tmp_path / "docs" / "README.md"
    page.write_text(page.read_text(encoding="utf-8").replace(pages.MARK, "", 1), encoding="utf-8")
    with pytest.raises(ValueError, match=r"docs/README.md should have 2 marks .* it has 1"):
        write([])
    shutil.copyfile(ROOT / "docs/README.md", page)
    (tmp_path / "README.md").write_text("**Nothing has run on a GPU yet.**\n")
    with pytest.raises(ValueError, match=r"README.md should have one sentence"):
        write([])
