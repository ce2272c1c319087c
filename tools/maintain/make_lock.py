"""Rewrites tools/locks/cpu-py311.txt from the environment it runs in: .venv/bin/python tools/maintain/make_lock.py

The lock is everything that `megatron_aspo[cpu,dev]` needs, directly or through others, at the versions installed now, and nothing else.
To change a pin: install the new version into .venv, run the tests, run this.
"""

import importlib.metadata
import os
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = Path(__file__).resolve().parents[1] / "locks" / "cpu-py311.txt"
ROOT = "megatron_aspo[cpu,dev]"
LEFT_OUT = {
    "cellpylib": "it has no wheel; reasoning-gym's game_of_life tasks alone use it, and are refused without",
    "pycosat": "it has no wheel, and building it needs a C compiler; reasoning-gym's zebra_puzzles alone use it, and are refused without",
    "zss": "it has no wheel; of reasoning-gym only a task uses it that is refused anyhow",
    "torchaudio": "its PyPI build is for CUDA and breaks `import vllm` beside a CPU torch",
    "torchcodec": "as torchaudio",
    "torchvision": "as torchaudio",
    "triton": "1 GB; xgrammar names it, vLLM on CPU runs without it",
}
HEADER = """\
# Every package of a CPU environment for Linux x86_64 with Python 3.11, direct and indirect. Written by tools/maintain/make_lock.py.
# Install through tools/setup_env.sh, or: pip install --no-deps -r tools/locks/cpu-py311.txt
# --no-deps is part of the lock: it keeps out what some of these packages name and nothing here needs:
{left_out}# No hashes: torch's CPU build comes from PyTorch's own index and elsewhere from mirrors that build or repack it.
# Wheels, and one package of pure Python that has none: omegaconf and hydra, which users may add, work with this version only.
--only-binary :all:
--no-binary antlr4-python3-runtime
"""


def resolve(root: str) -> dict[str, str]:
    """The dependency closure of the requirement `root` in the running environment.

    Returns distribution name → version, sorted by canonical name, without `root` itself and without LEFT_OUT.
    Raises SystemExit naming every requirement that is missing or installed at a version that does not satisfy it.
    """
    installed: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        # The first on the path is the one that is imported: setuptools, once imported, appends copies of its own.
        installed.setdefault(canonicalize_name(distribution.metadata["Name"]), distribution)
    extras_seen: dict[str, set[str]] = {}
    problems = []
    todo = [(Requirement(root), "the lock's root")]
    while todo:
        requirement, wanted_by = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in LEFT_OUT:
            continue
        if name not in installed:
            problems.append(f"{requirement} (needed by {wanted_by}) is not installed")
            continue
        if not requirement.specifier.contains(installed[name].version, prereleases=True):
            problems.append(f"{requirement} (needed by {wanted_by}) is installed as {installed[name].version}")
        new_extras = {"", *requirement.extras} - extras_seen.setdefault(name, set())
        extras_seen[name] |= new_extras
        for line in installed[name].requires or []:
            child = Requirement(line)
            if any(child.marker is None or child.marker.evaluate({"extra": extra}) for extra in new_extras):
                todo.append((child, name))
    if problems:
        raise SystemExit("error: " + "; ".join(sorted(set(problems))))
    del extras_seen[canonicalize_name(Requirement(root).name)]
    return {installed[name].metadata["Name"]: installed[name].version for name in sorted(extras_seen)}


def render(pins: dict[str, str]) -> str:
    left_out = "".join(f"#   {name}: {reason}\n" for name, reason in LEFT_OUT.items())
    return HEADER.format(left_out=left_out) + "".join(f"{name}=={version}\n" for name, version in pins.items())


def main() -> int:
    beside = LOCK.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(render(resolve(ROOT)))
    beside.rename(LOCK)
    print(f"wrote {LOCK}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
