"""Options of held-out evaluation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationOptions:
    draws: int = 16
    """Responses sampled for each held-out prompt; 0 turns evaluation off."""
    temperature: float = 1.0
    """Sampling temperature of evaluations."""
    every: int = 0
    """Also evaluate after every N steps; 0 evaluates only before and after training."""
