"""Options of checkpoints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointOptions:
    every: int = 0
    """Steps between checkpoints from which a run can be resumed; the last step makes one too. 0 makes none."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written, from a copy in host memory."""
    keep_last: int = 2
    """How many of the newest checkpoints stay; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of steps that are a multiple of it stay, too; 0: no such."""
    keep_best: int = 0
    """How many with the best held-out accuracy stay, too; needs an evaluation at each checkpoint."""
