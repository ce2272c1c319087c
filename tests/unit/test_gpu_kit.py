"""The parts of the kit for a card without network that need neither. tools/maintain/make_gpu_kit.sh itself tests the kit that it makes."""

import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from tests.unit.test_packaging import ROOT, load_tool

MAKE = ROOT / "tools" / "maintain" / "make_gpu_kit.sh"
TOOL = ROOT / "tools" / "maintain" / "keep_gpu_code.py"


# --- GPU code of one architecture ---------------------------------------------------------------------------------------------------------


def entry(kind: int, architecture: int, code: bytes) -> bytes:
    """Return an entry as CUDA 13's compiler lays it out: kind, version, header bytes, code bytes, …, architecture at byte 28 (64 bytes)."""
    header = bytearray(64)
    struct.pack_into("<HHIQ", header, 0, kind, 0x101, 64, len(code))
    struct.pack_into("<I", header, 28, architecture)
    return bytes(header) + code


def container(*entries: bytes) -> bytes:
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, sum(map(len, entries))) + b"".join(entries)


def library(code: bytes, name: bytes = b".nv_fatbin") -> bytes:
    """Return a shared library with one section of GPU code between other bytes."""
    names = b"\0" + name + b"\0.shstrtab\0"
    code_at, names_at = 128, 128 + len(code) + 64
    table_at = -(-(names_at + len(names)) // 8) * 8

    def section(name_at: int, kind: int, offset: int, nbytes: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name_at, kind, 0, 0, offset, nbytes, 0, 0, 8, 0)

    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 0, table_at, 0, 64, 0, 0, 64, 3, 2)
    body = header.ljust(code_at, b"h") + code + b"t" * 64 + names
    return body.ljust(table_at, b"\0") + bytes(64) + section(1, 1, code_at, len(code)) + section(len(name) + 2, 3, names_at, len(names))


def test_the_code_of_one_architecture_is_kept_and_the_layout_unchanged(tmp_path):
    hopper, special, tail = entry(2, 90, b"hopper!!" * 3), entry(2, 90, b"sm_90a.." * 2), entry(2, 90, b"second..")
    others = entry(2, 80, b"ampere.." * 5), entry(1, 90, b"ptx....." * 2), entry(2, 100, b"blackwel" * 7)
    first = container(others[0], hopper, others[1], special, others[2])
    second = container(tail, others[0])
    file = tmp_path / "lib.so"
    file.write_bytes(library(first + bytes(8) + second))
    file.chmod(0o755)
    done = subprocess.run([sys.executable, str(TOOL), str(file), "sm_90"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = [container(hopper, special).ljust(len(first), b"\0"), container(tail).ljust(len(second), b"\0")]
    assert file.read_bytes() == library(kept[0] + bytes(8) + kept[1])
    assert "cubin sm_100: 0.0 MiB" in done.stdout and "ptx sm_90: 0.0 MiB" in done.stdout and "kept: 0.0 MiB" in done.stdout
    again = file.read_bytes()
    assert subprocess.run([sys.executable, str(TOOL), str(file), "sm_90"]).returncode == 0
    assert file.read_bytes() == again and [path.name for path in tmp_path.iterdir()] == ["lib.so"]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"#!/bin/sh\n" * 30, "no ELF file"),
        (library(container(entry(2, 90, b"........")), name=b".rodata"), "has no section .nv_fatbin"),
        (library(container(entry(2, 90, b"........")) + container(entry(1, 90, b"ptx....."))), "has no part for sm_90"),
        (library(b"\1" * 64), "unknown GPU code at byte 128"),
        (library(container(entry(2, 90, b"........"))[:-1] + b"\0" * 8 + container(entry(7, 90, b"........"))), "unknown GPU code"),
    ],
    ids=["a script", "no GPU code", "PTX alone", "no container", "unknown kind"],
)
def test_a_library_of_unknown_layout_is_unchanged(tmp_path, content, error):
    file = tmp_path / "lib.so"
    file.write_bytes(content)
    done = subprocess.run([sys.executable, str(TOOL), str(file), "sm_90"], capture_output=True, text=True)
    assert done.returncode == 1 and error in done.stderr and done.stderr.count("\n") == 1
    assert file.read_bytes() == content and [path.name for path in tmp_path.iterdir()] == ["lib.so"]


# --- locks --------------------------------------------------------------------------------------------------------------------------------


def lock(name: str) -> dict[str, str]:
    lines = [line.split() for line in (ROOT / "tools" / "locks" / name).read_text().splitlines() if line[0] != "#"]
    assert all(len(line) == 2 and len(line[1].removeprefix("--hash=sha256:")) == 64 for line in lines)
    return dict(pin.lower().replace("_", "-").split("==") for pin, _ in lines)


def test_the_kit_has_the_packages_that_the_other_machine_lacks_in_the_tools_versions():
    host, kit, tool = lock("gpu-kit-host-py312.txt"), lock("gpu-kit-py312.txt"), load_tool("make_gpu_kit_lock")
    assert not host.keys() & kit.keys()
    assert {"pydantic", "transformer-engine-torch"} <= kit.keys()
    for pins, wanted in ((host, tool.HOST), (kit, tool.KIT)):
        assert all(pins[name.replace("_", "-")] == (version or pins[name.replace("_", "-")]) for name, version in wanted.items())
    assert len({version for name, version in kit.items() if name.startswith("transformer-engine")}) == 1
    script = MAKE.read_text()
    major = ".".join(host["torch"].split(".")[:2])
    assert f'"$made_of" 3.12 {major}\n' in script and f"transformer_engine_torch-{kit['transformer-engine-torch']}.dist-info" in script


# --- the script ---------------------------------------------------------------------------------------------------------------------------


def run_script(tmp_path: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run functions of the script without its main part."""
    prepared = f'source "{MAKE}"; work="{tmp_path}/work"; target="{tmp_path}/kit"; made_of=$(fingerprint); mkdir -p "$work"; {code}'
    return subprocess.run(["bash", "-c", prepared], capture_output=True, text=True, env=os.environ | environment, timeout=120)


def tools_without(tmp_path: Path, *left_out: str) -> str:
    """Return a PATH with the commands that the script needs, except these."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in (
        "bash",
        "uname",
        "g++",
        "strip",
        "xz",
        "sha256sum",
        "flock",
        "git",
        "dirname",
        "cat",
        "cut",
        "awk",
        "realpath",
        "mkdir",
        "grep",
    ):
        if name not in left_out and (found := shutil.which(name)):
            (folder / name).symlink_to(found)
    return str(folder)


def script_file(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_a_missing_tool_is_named_in_one_line(tmp_path):
    done = subprocess.run(
        [shutil.which("bash"), str(MAKE), str(tmp_path / "kit")],
        capture_output=True,
        text=True,
        env={"PATH": tools_without(tmp_path, "xz"), "HOME": str(tmp_path)},
    )
    # The script looks for tools in this order: on a machine without a compiler, that comes first.
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "was not found; install it" in done.stderr
    assert not (tmp_path / "kit").exists()


@pytest.mark.parametrize(
    ("python", "error"),
    [
        ("/nowhere/python", "Python 3.12 was not found; install it, or name it with PYTHON="),
        (sys.executable, "Python 3.12 was not found"),
    ],
    ids=["absent", "another version"],
)
def test_another_python_is_refused(tmp_path, python, error):
    if sys.version_info[:2] == (3, 12) and python == sys.executable:
        python = shutil.which("true")
    done = run_script(tmp_path, "check_machine", PYTHON=python)
    assert done.returncode == 1 and error in done.stderr.splitlines()[-1] and done.stderr.count("\n") == 1


def test_too_little_disk_space_is_refused_with_the_free_space(tmp_path):
    """Every machine has less than the required size."""
    python = script_file(tmp_path / "python3.12", f'#!/bin/sh\ncase "$2" in *get_path*) echo {tmp_path};; *) echo True;; esac\n')
    (tmp_path / "Python.h").touch()
    done = run_script(tmp_path, "disk_gib=1000000000; check_machine", PYTHON=str(python))
    assert done.returncode == 1 and "1000000000 GiB of free disk are needed beside" in done.stderr and done.stderr.count("\n") == 1
    (tmp_path / "Python.h").unlink()
    done = run_script(tmp_path, "check_machine", PYTHON=str(python))
    assert done.returncode == 1 and f"has no headers in {tmp_path}; install them" in done.stderr


def test_a_failed_step_ends_the_script_and_is_repeated_and_a_finished_one_is_not(tmp_path):
    work = tmp_path / "work"
    code = 'fine() { echo x >>"$work/count"; }; wrong() { echo "the cause"; false; echo "went on" >&2; }; '
    code += "step good fine; step bad wrong; echo no"
    for _ in range(2):
        done = run_script(tmp_path, code)
        assert done.returncode == 1 and "no" not in done.stdout.split()
        assert "the cause" in done.stderr and f"bad failed; the whole output is in {work}/bad.log" in done.stderr
        assert "went on" not in done.stderr
    assert (work / "count").read_text() == "x\n"
    assert run_script(tmp_path, f"made_of=other; {code}").returncode == 1
    assert (work / "count").read_text() == "x\nx\n"


def test_an_earlier_kit_is_complete_until_the_new_one_replaces_it(tmp_path):
    site = tmp_path / "site"
    (site / "a_package" / "__pycache__").mkdir(parents=True)
    (site / "bin").mkdir()
    (site / "a_package" / "__init__.py").write_text("name = 'a'\n")
    (site / "a_package" / "__pycache__" / "x.pyc").touch()
    kit = tmp_path / "kit"
    kit.mkdir()
    (kit / "old").touch()
    failing = run_script(
        tmp_path, f'pack "{site}" "$work/kit"; step size check_size "$work/kit"; limit_mib=0; step again check_size "$work/kit"'
    )
    assert failing.returncode == 1 and "together they may have 0 MiB" in failing.stderr
    assert [path.name for path in kit.iterdir()] == ["old"]
    done = run_script(tmp_path, f'pack "{site}" "$work/kit"; publish "$work/kit"; main "$target"')
    assert done.returncode == 0 and "is up to date" in done.stdout, done.stderr
    assert {path.name for path in kit.iterdir()} == {"activate.sh", "manifest", "packages.tar.xz"}
    with tarfile.open(kit / "packages.tar.xz") as archive:
        assert {Path(name).name for name in archive.getnames()} == {"", "a_package", "__init__.py"}
    manifest = (kit / "manifest").read_text().splitlines()
    assert f"packages={hashlib.sha256((kit / 'packages.tar.xz').read_bytes()).hexdigest()}" in manifest
    assert "# megatron-core==0.16.1" in manifest
    assert {path.name for path in tmp_path.iterdir()} == {"site", "kit", "work"}


# --- on the machine with the card
# -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def kit(tmp_path):
    """Make a kit with one package, for the Python and the torch that run here."""
    folder = tmp_path / "kit"
    folder.mkdir()
    (tmp_path / "carried_package.py").write_text("name = 'carried'\n")
    with tarfile.open(folder / "packages.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "carried_package.py", "./carried_package.py")
    digest = hashlib.sha256((folder / "packages.tar.xz").read_bytes()).hexdigest()
    python, version = f"{sys.version_info[0]}.{sys.version_info[1]}", ".".join(torch.__version__.split(".")[:2])
    (folder / "manifest").write_text(f"made_of=x\npython={python}\ntorch={version}\npackages={digest}\n")
    shutil.copyfile(ROOT / "tools" / "maintain" / "gpu_kit_activate.sh", folder / "activate.sh")
    return folder


def activate(kit: Path, code: str = "") -> subprocess.CompletedProcess:
    home = kit.parent / "home"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHON": sys.executable, "GPU_KIT_HOME": str(home)}
    script = f'source "{kit}/activate.sh" && {code or "true"}'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, cwd=kit.parent / "kit", timeout=120)


def test_the_packages_of_a_kit_are_unpacked_once_and_come_first(kit):
    (kit.parent / "carried_package.py").unlink()
    imports = '"$PYTHON" -c "import carried_package; print(carried_package.name)"'
    assert activate(kit, imports).stdout == "carried\n"
    [home] = (kit.parent / "home").iterdir()
    (home / "carried_package.py").write_text("name = 'unpacked before'\n")
    assert activate(kit, imports).stdout == "unpacked before\n"
    assert activate(kit, 'export PYTHONPATH=/other; source ./activate.sh; echo "$PYTHONPATH"').stdout == f"{home}:/other\n"


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda kit: (kit / "packages.tar.xz").write_bytes(b"half"), "packages.tar.xz is damaged; carry it again"),
        (lambda kit: _replace(kit, "torch=", "torch=1.2 #"), "the kit is for Python 3.* torch 1.2"),
        (lambda kit: _replace(kit, "python=", "python=2.7 #"), "the kit is for Python 2.7"),
        (lambda kit: (kit.parent / "home").write_text("in the way"), "it cannot be unpacked into"),
    ],
    ids=["damaged", "another torch", "another Python", "no room"],
)
def test_a_kit_that_does_not_fit_is_refused_in_one_line(kit, damage, error):
    damage(kit)
    done = activate(kit, "echo went on")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("gpu kit: error: ") and not done.stdout
    assert all(part in last for part in error.split(".*"))
    assert not (kit.parent / "home").is_dir() or not list((kit.parent / "home").iterdir())


def _replace(kit: Path, old: str, new: str) -> None:
    manifest = kit / "manifest"
    manifest.write_text(manifest.read_text().replace(old, new, 1))
