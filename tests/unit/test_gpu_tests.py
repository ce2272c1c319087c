"""The tests that need a GPU can be collected on a machine with no other packages, so that time on a card is not lost to an import error."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_RAY_AND_VLLM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "vllm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(scope="module")
def collected() -> str:
    """Return the tests that pytest finds in tests/gpu where neither Ray nor vLLM can be imported."""
    code = WITHOUT_RAY_AND_VLLM + "import pytest; sys.exit(pytest.main(['--collect-only', '-qq', '-rs', 'tests/gpu']))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "tests/gpu").glob("test_*.py")))
def test_gpu_tests_are_collected_without_ray_and_vllm_unless_they_need_them(collected: str, name: str):
    needs_engine = name == "test_engine"
    assert (f"tests/gpu/{name}.py:" in collected and f"SKIPPED [1] tests/gpu/{name}.py" not in collected) == (not needs_engine), collected
