"""Options of checkpoints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointOptions:
    every: int = 0
    """Steps between checkpoints; the last step makes one too. 0 makes none."""
    asynchronous: bool = True
    """Write a checkpoint from a copy in host memory while training goes on."""
    keep_last: int = 2
    """Number of newest checkpoints to keep; 0 keeps all."""
    keep_every: int = 0
    """Also keep checkpoints whose step is a multiple of this; a multiple of `checkpoint.every`. 0 keeps none for this reason."""
    keep_best: int = 0
    """Also keep this many checkpoints with the best held-out accuracy; needs an evaluation at each checkpoint."""
