"""The machine: its card, and the packages that must match."""

from collections.abc import Callable, Iterator


def cases(small: bool) -> Iterator[tuple[str, Callable[[], dict]]]:
    yield "card", lambda: card(small)
    yield "Transformer Engine", transformer_engine


def card(small: bool) -> dict:
    import torch
    from gpu_check import versions

    found = torch.cuda.is_available()
    figures = {"passed": found or small, "versions": versions(), "cudnn": torch.backends.cudnn.version() if found else None}
    if found:
        free, total = torch.cuda.mem_get_info()
        figures |= {"card": torch.cuda.get_device_name(), "free_gb": round(free / 1e9, 1), "total_gb": round(total / 1e9, 1)}
    return figures


def transformer_engine() -> dict:
    """Import it with its torch extension, and compute with its kernel library."""
    import torch

    if not torch.cuda.is_available():
        return {"passed": None, "skipped": "no GPU"}
    import transformer_engine.pytorch

    layer = transformer_engine.pytorch.LayerNormLinear(64, 32, normalization="RMSNorm", bias=False, params_dtype=torch.bfloat16)
    hidden = torch.randn(16, 64, dtype=torch.bfloat16, device="cuda")
    norm = hidden.double() * (hidden.double().square().mean(-1, keepdim=True) + layer.eps).rsqrt()
    error = float((layer(hidden).double() - norm @ layer.weight.double().t()).abs().max())
    # The attribute that free_fp8_weights empties.
    return {"passed": error < 0.05 and "_fp8_workspaces" in vars(layer), "error": error, "version": transformer_engine.__version__}
