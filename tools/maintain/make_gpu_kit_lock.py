"""Write the two locks of tools/maintain/make_gpu_kit.sh: python3.12 tools/maintain/make_gpu_kit_lock.py

tools/locks/gpu-kit-host-py312.txt: packages that the machine with the card has already; the kit is compiled and tested against them here.
tools/locks/gpu-kit-py312.txt: packages that the kit adds. Each has the SHA-256 of the one file for Python 3.12 on Linux x86_64.
Needs a package index; nothing is installed.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOST = {
    "torch": "2.11.0",
    "transformers": "5.17.0",
    "numpy": "2.5.2",
    "safetensors": "0.8.0",
    "tokenizers": "0.23.2",
    "huggingface_hub": "1.33.0",
    "accelerate": "1.15.0",
    # Transformer Engine imports them.
    "einops": "",
    "onnx": "1.23.1",
    "onnxscript": "0.7.2",
    # The check, and the tests that it takes its cases from.
    "psutil": "",
    "pytest": "",
    "pyyaml": "",
    # Headers, and the compiler's version, which the build of Transformer Engine's torch extension requires.
    "nvidia-cuda-cccl": "13.0.85",
    "nvidia-cuda-crt": "13.0.88",
    "nvidia-cuda-nvcc": "13.0.88",
    "wheel": "",
}
KIT = {
    "megatron-core": "0.16.1",
    "transformer-engine": "2.11.0",
    "transformer-engine-cu13": "2.11.0",
    # Other packages that need these; a machine with the packages above did not have them.
    "pydantic": "",
    "pydantic-core": "",
    "annotated-types": "",
    "typing-inspection": "",
}
SOURCE = "transformer_engine_torch==2.11.0 --hash=sha256:b58d6322bdf885dfab0646da572aff9cf090b332ad470559aa58883c231e1816"
"""The one package built from source; pip reports a hash only for packages that need no build."""
HEADER = "# {title}: Linux x86_64, Python 3.12, CUDA 13.0.\n# Written by tools/maintain/make_gpu_kit_lock.py.\n"


def resolve(requirements: dict[str, str]) -> dict[str, str]:
    """Return name → line of a lock, for the requirements and all their dependencies. Raises CalledProcessError if they do not resolve."""
    asked = [f"{name}=={version}" if version else name for name, version in requirements.items()]
    with tempfile.TemporaryDirectory() as name:
        report = Path(name, "report.json")
        options = ["--dry-run", "--ignore-installed", "--only-binary", ":all:", "--quiet", "--report", str(report)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *asked], check=True)
        packages = json.loads(report.read_text())["install"]
    lines = {}
    for package in packages:
        about, sha256 = package["metadata"], package["download_info"]["archive_info"]["hashes"]["sha256"]
        lines[about["name"].lower().replace("_", "-")] = f"{about['name']}=={about['version']} --hash=sha256:{sha256}"
    return lines


def main() -> None:
    if sys.version_info[:2] != (3, 12):
        sys.exit(f"make_gpu_kit_lock: error: the locks are for Python 3.12, this is {sys.version.split()[0]}")
    host = {name: line for name, line in resolve(HOST).items() if name not in KIT}
    kit = {name: line for name, line in resolve(HOST | KIT).items() if name not in host}
    locks = {
        "gpu-kit-host-py312": ("What tools/maintain/make_gpu_kit.sh expects where the kit is used, and installs here to make it", host),
        "gpu-kit-py312": ("What the kit of tools/maintain/make_gpu_kit.sh brings", kit | {"transformer-engine-torch": SOURCE}),
    }
    for name, (title, lines) in locks.items():
        text = HEADER.format(title=title) + "".join(f"{lines[package]}\n" for package in sorted(lines))
        Path(ROOT, "tools", "locks", f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
