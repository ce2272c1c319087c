"""Checks of the installed Transformer Engine, its completeness and the libraries beside it, and release of its FP8 weights."""

import importlib
import importlib.metadata
import importlib.util

import torch
from packaging.version import Version

from megatron_aspo.common.errors import UserError

_CUBLAS_WITH_GROUPED_LAYOUTS = Version("13.2.0.9")
_NEEDS_THEM, _NEEDS_THEM_FOR_EXPERTS = Version("2.13"), Version("2.17.1")
"""First versions of the prebuilt CUDA 13 library that need these symbols: at import, and only when a grouped product is computed.
See TransformerEngine#2504."""


def is_installed() -> bool:
    """Return whether there is a package of this name, complete or not."""
    return importlib.util.find_spec("transformer_engine") is not None


def check_installation() -> None:
    """Raise UserError for a Transformer Engine that is installed and cannot be imported, naming what is missing.

    Megatron-Core imports it wherever it finds it: some of these faults break Megatron's import, others leave stubs that fail much later.
    """
    if not is_installed():
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a missing module, a library that does not load, or a check of the package itself
        if missing := cublas_conflict(installed_version("transformer_engine_cu13"), installed_version("nvidia-cublas"), experts=False):
            raise UserError(missing) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        extension = f"transformer-engine-torch=={installed_version('transformer_engine')}"
        cure = f"build its torch extension (pip install --no-build-isolation {extension})"
        if importlib.util.find_spec("transformer_engine_torch") is not None:
            cure = "install the versions that setup.py's extra `gpu` names"
        raise UserError(f"transformer_engine is installed but cannot be imported: {reason}; {cure}, or remove the package") from error


def cublas_conflict(engine: str, cublas: str, *, experts: bool) -> str:
    """Return how these versions of Transformer Engine's prebuilt CUDA 13 library and of cuBLAS conflict, with the cure, or "".

    Either may be "": not installed as a package. experts: whether grouped products are computed.
    """
    if not engine or not cublas or Version(cublas) >= _CUBLAS_WITH_GROUPED_LAYOUTS or Version(engine) < _NEEDS_THEM:
        return ""
    if Version(engine) >= _NEEDS_THEM_FOR_EXPERTS and not experts:
        return ""
    what = "grouped products of experts in " if Version(engine) >= _NEEDS_THEM_FOR_EXPERTS else ""
    return (
        f"{what}transformer_engine_cu13 {engine} need nvidia-cublas {_CUBLAS_WITH_GROUPED_LAYOUTS} or later, {cublas} is installed; "
        "upgrade nvidia-cublas, or install transformer-engine 2.12.0"
    )


def installed_version(distribution: str) -> str:
    """Return the version of an installed distribution, or ""."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def free_fp8_weights(model: torch.nn.Module) -> None:
    """Free the FP8 copies of weights that Transformer Engine's modules keep from one micro-batch to the next. No-op for other modules.

    The first micro-batch of a pass makes them again anyway. The attribute is private; its name is that of Transformer Engine 2.11 and 2.12.
    """
    for module in model.modules():
        getattr(module, "_fp8_workspaces", {}).clear()
