"""Write tools/locks/gpu-py312.txt, every package of `megatron_aspo[gpu]` for CUDA 13, Python 3.12 and Linux x86_64:
python tools/maintain/make_gpu_lock.py [--check] [--upgrade]

Needs uv (`pip install uv`) and a package index; nothing is installed. The lock's versions stay where they still resolve; --upgrade takes
the newest. With --check nothing is written; the exit status is 1 if what resolves is not what the lock says.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "tools" / "locks" / "gpu-py312.txt"
PLATFORM = "x86_64-manylinux_2_39"
"""Ubuntu 24.04's; under manylinux_2_28 `llguidance` has no wheel."""
LEFT_OUT = {"transformer-engine-cu12": "transformer-engine-torch names it where no CUDA 13 is installed at its build; cu13 takes its place"}
HEADER = """\
# Every package of a GPU environment for Linux x86_64 with Python 3.12 and CUDA 13. Written by tools/maintain/make_gpu_lock.py.
# It resolves; it has not run on hardware yet. Install torch first, then with --no-deps --no-build-isolation -r this file:
# transformer-engine-torch is built from source, against the torch that is installed (C++ only; needs CUDA 13's headers).
"""


def resolve(upgrade: bool) -> list[str]:
    """Return `name==version` for each package, sorted; as locked where that resolves, unless upgrade. Raises SystemExit with uv's words."""
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    if not Path(uv).is_file():
        raise SystemExit("make_gpu_lock: error: uv is not installed; pip install uv")
    with tempfile.TemporaryDirectory() as name:
        # In a copy: building the metadata leaves files beside setup.py.
        for file in ("setup.py", "megatron_aspo/__init__.py"):
            target = Path(name, file)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(ROOT / file, target)
        if not upgrade:
            shutil.copyfile(LOCK, Path(name, "lock.txt"))  # uv prefers what its output file has
        options = ["--python-version", "3.12", "--python-platform", PLATFORM, "--no-emit-index-url", "--no-annotate", "--no-header", "-q"]
        options += ["--output-file", "lock.txt"]
        result = subprocess.run([uv, "pip", "compile", "setup.py", "--extra", "gpu", *options], cwd=name, capture_output=True, text=True)
        lines = Path(name, "lock.txt").read_text(encoding="utf-8").splitlines() if not result.returncode else []
    if result.returncode:
        raise SystemExit(f"make_gpu_lock: error: the gpu extra of setup.py does not resolve:\n{result.stderr.strip()}")
    return [line for line in lines if line.partition("==")[0] not in LEFT_OUT]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; say what differs")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that resolve")
    parsed = parser.parse_args()
    lines = resolve(parsed.upgrade)
    if not parsed.check:
        left_out = "".join(f"# Left out: {name}: {reason}.\n" for name, reason in LEFT_OUT.items())
        LOCK.write_text(HEADER + left_out + "\n".join(lines) + "\n", encoding="utf-8")
        return 0
    locked = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    differing = sorted(set(locked) ^ set(lines))
    print("\n".join(differing) or f"{len(locked)} packages, as locked")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
