"""The two steps of the log-probabilities that read logits, in closed form and float64, and checks of an implementation against them."""

from types import ModuleType

import torch
from torch import Tensor


def random_logits(tokens: int, columns: int, dtype: torch.dtype, size: float = 3.0) -> tuple[Tensor, Tensor]:
    """Return logits and each target's column; every third target is before this vocabulary block, every third after it."""
    generator = torch.Generator().manual_seed(tokens * 10_007 + columns)
    logits = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) * size
    targets = torch.randint(columns, (tokens,), generator=generator)
    targets[1::3] = -1 - targets[1::3]
    targets[2::3] += columns
    return logits.to(dtype), targets


def onehot(targets: Tensor, columns: int) -> Tensor:
    return (targets[:, None] == torch.arange(columns, device=targets.device)).double()


def expected_statistics(logits: Tensor, temperature: float, targets: Tensor) -> Tensor:
    x = logits.double() / temperature
    d = x - x.max(-1, keepdim=True).values
    at_target = (x * onehot(targets, x.shape[1])).sum(-1)
    return torch.stack([x.max(-1).values, d.exp().sum(-1), (d.exp() * d).sum(-1), at_target])


def check_statistics(steps: ModuleType, logits: Tensor, temperature: float, targets: Tensor) -> None:
    given = logits.clone()
    found = steps.statistics(logits, temperature, targets)
    expected = expected_statistics(given, temperature, targets)
    assert found.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if logits.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * max(1.0, expected[0].abs().max().item()))
    assert torch.equal(logits, given)


def check_gradient(steps: ModuleType, logits: Tensor, temperature: float, targets: Tensor, *, with_slope: bool, rounding: float) -> None:
    """Check the gradient, and that memory after the logits is unchanged. rounding: largest relative error of rounding to bfloat16."""
    tokens, columns = logits.shape
    accumulator = torch.float64 if logits.dtype == torch.float64 else torch.float32
    behind = torch.full((300,), 7.0, dtype=logits.dtype, device=logits.device)
    memory = torch.cat([logits.flatten(), behind])
    x = logits.double() / temperature
    peak = x.max(-1).values.to(accumulator)
    generator = torch.Generator().manual_seed(0)
    offset, slope, at_target = torch.randn(3, tokens, generator=generator, dtype=torch.float64).to(logits.device, accumulator)
    d = x - peak.double()[:, None]
    factor = offset.double()[:, None] + (slope.double()[:, None] * d if with_slope else 0)
    expected = d.exp() * factor + onehot(targets, columns) * at_target.double()[:, None]

    gradient = memory[: tokens * columns].view(tokens, columns)
    steps.gradient_(gradient, temperature, targets, peak, offset, slope if with_slope else None, at_target)
    relative = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: rounding}[logits.dtype]
    absolute = 1e-12 if logits.dtype == torch.float64 else 3e-6
    torch.testing.assert_close(gradient.double(), expected, rtol=relative, atol=absolute)
    assert torch.equal(memory[tokens * columns :], behind)
