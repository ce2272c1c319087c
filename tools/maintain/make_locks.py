"""Write the locks of tools/locks from setup.py: python tools/maintain/make_locks.py [cpu] [gpu] [--check] [--upgrade]

cpu-py311.txt has every package of `megatron_aspo[cpu,dev]` for Python 3.11, gpu-py312.txt every package of `megatron_aspo[gpu]` for CUDA 13
and Python 3.12, both for Linux x86_64. uv resolves them; it needs a package index, and nothing is installed. A locked version is kept where
it still resolves; --upgrade takes the newest. With --check nothing is written: the exit status is 1 if the resolution differs from the
lock. Where PyTorch's own index cannot be reached, `--find-links DIR` names a folder with the CPU build of torch.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Lock:
    file: str
    extras: tuple[str, ...]
    python: str
    platform: str
    """One of uv's manylinux platforms."""
    left_out: dict[str, str]
    """Package → why neither it nor the dependencies of it alone are in the lock."""
    header: str
    torch: str = ""
    """A requirement that replaces the one on torch."""

    @property
    def path(self) -> Path:
        return ROOT / "tools" / "locks" / self.file

    def text(self, pins: list[str]) -> str:
        """Return the lock with these `name==version` lines."""
        header, _, options = self.header.partition("{left_out}")
        left_out = "".join(f"#   {name}: {reason}\n" for name, reason in self.left_out.items())
        return header + left_out + options + "".join(f"{pin}\n" for pin in pins)

    def pins(self) -> list[str]:
        """Return the `name==version` lines of the file."""
        return [line for line in self.path.read_text(encoding="utf-8").splitlines() if line[0] not in "#-"]


LOCKS = {
    "cpu": Lock(
        "cpu-py311.txt",
        ("cpu", "dev"),
        "3.11",
        "x86_64-manylinux_2_28",
        {
            "cellpylib": "it has no wheel; reasoning-gym's game_of_life tasks alone use it, and are refused without",
            "pycosat": "its wheel needs a C compiler; reasoning-gym's zebra_puzzles alone use it, and are refused without",
            "zss": "it has no wheel; of reasoning-gym only a task uses it that is refused anyhow",
            "torchaudio": "its PyPI build is for CUDA and breaks `import vllm` beside a CPU torch",
            "torchcodec": "as torchaudio",
            "torchvision": "as torchaudio",
            "triton": "1 GB; xgrammar names it, vLLM on CPU runs without it",
        },
        """\
# Every package of a CPU environment for Linux x86_64 with Python 3.11, direct and indirect. Written by tools/maintain/make_locks.py.
# Install through tools/setup_env.sh, or: pip install --no-deps -r tools/locks/cpu-py311.txt
# --no-deps is part of the lock: it keeps out what some of these packages name and nothing here needs:
{left_out}# No hashes: torch's CPU build comes from PyTorch's own index and elsewhere from mirrors that build or repack it.
# Wheels, and one package of pure Python that has none: omegaconf and hydra, which users may add, work with this version only.
--only-binary :all:
--no-binary antlr4-python3-runtime
""",
        torch="torch==2.13.0+cpu",
    ),
    "gpu": Lock(
        "gpu-py312.txt",
        ("gpu",),
        "3.12",
        "x86_64-manylinux_2_39",  # Ubuntu 24.04's; under manylinux_2_28 `llguidance` has no wheel
        {"transformer-engine-cu12": "transformer-engine-torch names it where no CUDA 13 is installed at its build; cu13 takes its place"},
        """\
# Every package of a GPU environment for Linux x86_64 with Python 3.12 and CUDA 13. Written by tools/maintain/make_locks.py.
# It resolves; it has not run on hardware yet. Install torch first, then with --no-deps --no-build-isolation -r this file:
# transformer-engine-torch is built from source, against the torch that is installed (C++ only; needs CUDA 13's headers).
# Left out:
{left_out}""",
    ),
}


def resolve(lock: Lock, upgrade: bool, find_links: str) -> list[str]:
    """Return `name==version` for each package, sorted; locked versions first, unless upgrade. Raises SystemExit with uv's message."""
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    if not Path(uv).is_file():
        raise SystemExit("make_locks: error: uv is not installed; pip install uv")
    with tempfile.TemporaryDirectory() as name:
        # In a copy, because building the metadata leaves files beside setup.py.
        for file in ("setup.py", "megatron_aspo/__init__.py"):
            target = Path(name, file)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(ROOT / file, target)
        if not upgrade:
            Path(name, "lock.txt").write_text("\n".join(lock.pins()) + "\n", encoding="utf-8")  # uv prefers the versions in its output file
        never = [f"{package}; python_version < '3'" for package in lock.left_out]
        Path(name, "overrides.txt").write_text("\n".join([*never, lock.torch]) + "\n", encoding="utf-8")
        options = ["--python-version", lock.python, "--python-platform", lock.platform, "--override", "overrides.txt"]
        options += ["--no-emit-index-url", "--no-emit-find-links", "--no-annotate", "--no-header", "-q", "--output-file", "lock.txt"]
        options += [word for extra in lock.extras for word in ("--extra", extra)]
        if lock.torch:
            options += ["--find-links", find_links] if find_links else ["--torch-backend", "cpu"]
        result = subprocess.run([uv, "pip", "compile", "setup.py", *options], cwd=name, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"make_locks: error: {lock.file} does not resolve:\n{result.stderr.strip()}")
        return Path(name, "lock.txt").read_text(encoding="utf-8").splitlines()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("locks", nargs="*", metavar="cpu|gpu", help="default: both")
    parser.add_argument("--check", action="store_true", help="write nothing; print what differs")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that resolve")
    parser.add_argument("--find-links", default="", metavar="DIR", help="folder with the CPU build of torch, in place of PyTorch's index")
    parsed = parser.parse_args()
    if unknown := set(parsed.locks) - LOCKS.keys():
        parser.error(f"{', '.join(unknown)} is no lock; choose cpu or gpu")
    status = 0
    for name in parsed.locks or LOCKS:
        lock = LOCKS[name]
        pins = resolve(lock, parsed.upgrade, parsed.find_links)
        if not parsed.check:
            lock.path.write_text(lock.text(pins), encoding="utf-8")
        elif differing := sorted(set(lock.pins()) ^ set(pins)):
            print("\n".join(differing))
            status = 1
        else:
            print(f"{lock.file}: {len(pins)} packages, as locked")
    return status


if __name__ == "__main__":
    sys.exit(main())
