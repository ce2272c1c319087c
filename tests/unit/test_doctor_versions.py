"""`megatron-aspo doctor`: installed versions against setup.py, and GPUs, driver and torch."""

import os
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from megatron_aspo.doctor.gpus import check_gpus, check_torch, gpu_devices, judge_torch
from megatron_aspo.doctor.needs import NodeContext
from megatron_aspo.doctor.versions import check_versions
from tests.unit.doctor_process import ROOT, in_process


def fake_package(directory: Path, name: str, version: str, *lines: str) -> None:
    """Write package metadata that is found before the environment's own."""
    folder = directory / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines]) + "\n")


def versions_with(directory: Path):
    return in_process("versions.check_versions()", PYTHONPATH=os.pathsep.join((str(directory), str(ROOT))))


def test_the_environment_of_the_tests_is_the_tested_set():
    record = check_versions()
    assert record.status == "ok"
    for name in ("torch", "ray", "megatron-core", "transformers"):
        assert record.facts[name] == metadata.version(name) and f"{name} {metadata.version(name)}" in record.detail


@pytest.mark.parametrize(
    ("name", "version", "status", "message"),
    [
        ("megatron-core", "0.15.0", "failed", "megatron-core 0.15.0 is not <0.20,>=0.16.1"),
        ("transformers", "4.57.1", "failed", "transformers 4.57.1 is not <5.20,>=5.16.1"),
        ("torch", "2.12.0+cpu", "warning", "not the tested set: torch 2.12.0+cpu is not ==2.13.0"),
    ],
)
def test_a_version_outside_the_ranges_of_setup_py_is_named_with_its_range(tmp_path, name, version, status, message):
    fake_package(tmp_path, name, version)
    record = versions_with(tmp_path)
    assert record.status == status and record.detail.startswith(message) and "pip install 'megatron_aspo[cpu]'" in record.cure
    assert record.facts[name] == version


def test_a_package_that_is_missing_and_a_python_that_is_too_old_are_named(tmp_path):
    fake_package(tmp_path / "one", "megatron_aspo", "0.1.0", "Requires-Dist: no-such-package>=1")
    record = versions_with(tmp_path / "one")
    assert record.status == "failed" and record.detail.startswith("no-such-package is missing")
    fake_package(tmp_path / "two", "megatron_aspo", "0.1.0", "Requires-Python: >=4")
    record = versions_with(tmp_path / "two")
    assert record.status == "failed" and "megatron_aspo needs >=4" in record.detail


def test_an_untested_version_is_a_warning_for_the_installed_extra_only(tmp_path):
    """The GPU extra pins a Megatron-Core outside the range; it does not count beside the CPU build of vLLM."""
    needs = [
        'Requires-Dist: torch==9; extra == "gpu"',
        'Requires-Dist: torch>=2; extra == "cpu"',
        "Provides-Extra: cpu",
        "Provides-Extra: gpu",
    ]
    fake_package(tmp_path, "megatron_aspo", "0.1.0", *needs)
    assert versions_with(tmp_path).status == "ok"
    fake_package(tmp_path, "vllm", "0.32.0")
    record = versions_with(tmp_path)
    assert record.status == "warning" and "torch" in record.detail and "is not ==9" in record.detail and "[gpu]" in record.cure


NVIDIA_SMI = "NVIDIA H100 80GB HBM3, 580.82.07, 81559, {used}\n"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a program of that name before all others on PATH."""

    def make(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!{sys.executable}\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return make


def test_a_machine_without_gpus_is_fine_but_device_files_without_a_driver_are_not(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_gpus(5, devices=0).status == "ok"
    record = check_gpus(5, devices=8)
    assert record.status == "failed" and "8 device files, but there is no nvidia-smi" in record.detail and record.cure
    for name in ("nvidia0", "nvidia11", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert gpu_devices(tmp_path) == 2


def test_gpus_are_counted_with_their_driver_and_those_in_use_are_named(nvidia_smi):
    nvidia_smi(f"print({NVIDIA_SMI.format(used=4)!r} * 8)")
    record = check_gpus(5)
    assert record.status == "ok" and record.detail == "8 × NVIDIA H100 80GB HBM3, 79 GiB each, driver 580.82.07"
    assert record.facts["NVIDIA driver"] == "580.82.07" and record.facts["number of GPUs"] == "8"
    nvidia_smi(f"print({NVIDIA_SMI.format(used=4)!r} + {NVIDIA_SMI.format(used=70000)!r})")
    record = check_gpus(5)
    assert record.status == "warning" and record.detail.endswith("in use already: GPU 1: 70000 MiB")


@pytest.mark.parametrize(
    ("script", "limit_s", "message"),
    [
        (
            "import sys; print('Failed to initialize NVML: Driver/library version mismatch'); sys.exit(18)",
            60,
            "Driver/library version mismatch",
        ),
        ("import time; time.sleep(60)", 0.5, "no answer within 0.5 s"),
        ("pass", 60, "nvidia-smi lists none"),
    ],
    ids=["mismatch", "hangs", "empty"],
)
def test_a_driver_that_fails_or_hangs_is_named(nvidia_smi, script, limit_s, message):
    nvidia_smi(script)
    record = check_gpus(limit_s)
    assert record.status == "failed" and message in record.detail and "reload it or reboot" in record.cure


FOUND = {"torch": "2.13.0", "cuda": "13.0", "seconds": 2.0, "devices": ["H100"] * 8, "reason": "", "address": "10.0.0.1"}
FOUND |= {"gloo_bytes_per_s": 2e9, "gloo_error": ""}


@pytest.mark.parametrize(
    ("changes", "devices", "status", "message"),
    [
        ({}, 8, "ok", "8 GPUs"),
        ({"devices": ["H100"] * 4}, 8, "warning", "4 GPUs are hidden"),
        ({"devices": [], "reason": "driver too old"}, 8, "failed", "driver too old"),
        ({"devices": [], "cuda": ""}, 8, "failed", "without CUDA"),
        ({"devices": [], "cuda": ""}, 0, "ok", "without CUDA"),
        ({"gloo_error": "rank 1: timed out"}, 8, "failed", "gloo on 10.0.0.1: rank 1: timed out"),
    ],
)
def test_torch_must_see_all_gpus(changes, devices, status, message):
    record = judge_torch(FOUND | changes, devices)
    assert record.status == status and message in record.detail and bool(record.cure) == (status != "ok")


def test_torch_is_imported_and_sends_bytes_in_a_separate_process():
    record = check_torch(NodeContext("here"), 60)
    assert record.status == "ok" and metadata.version("torch") in record.detail and "gloo on 127.0.0.1 at" in record.detail


def test_the_command_and_the_checks_of_a_node_import_no_torch():
    """Otherwise one of them could initialise CUDA, or hang where a broken driver makes it hang."""
    modules = "megatron_aspo.doctor.command, megatron_aspo.doctor.worker, megatron_aspo.doctor.node"
    code = f"import sys, {modules}; print(sorted({{'torch', 'ray', 'vllm'}} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_address_that_this_machine_does_not_have_fails_the_trial_of_gloo():
    record = check_torch(NodeContext("here", address="203.0.113.7"), 60)
    assert record.status == "failed" and "203.0.113.7" in record.detail and "firewall" in record.cure


def test_a_torch_import_that_exceeds_the_limit_is_a_failure():
    assert "longer than 0.05 s" in check_torch(NodeContext("here"), 0.05).detail
