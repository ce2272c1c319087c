"""Options of held-out evaluation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationOptions:
    draws: int = 16
    """Responses to each held-out prompt; 0 turns evaluation off."""
    temperature: float = 1.0
    every: int = 0
    """Also after every this many steps; 0 for before and after training only."""
