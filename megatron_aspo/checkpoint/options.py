"""Options of checkpoints."""

from megatron_aspo.common.errors import require
from megatron_aspo.common.options import NonNegative, first_changed, options


@options("checkpoint")
class CheckpointOptions:
    every: NonNegative[int] = 0
    """Steps between checkpoints; the last step makes one too. 0 makes none."""
    asynchronous: bool = True
    """Write a checkpoint from a copy in host memory while training goes on."""
    keep_last: NonNegative[int] = 2
    """Number of newest checkpoints to keep; 0 keeps all."""
    keep_every: NonNegative[int] = 0
    """Also keep checkpoints whose step is a multiple of this; a multiple of `checkpoint.every`. 0 keeps none for this reason."""
    keep_best: NonNegative[int] = 0
    """Also keep this many checkpoints with the best held-out accuracy; needs an evaluation at each checkpoint."""


def check_checkpoint(checkpoint: CheckpointOptions) -> None:
    """Raise UserError for options of checkpoints that do not go together or have no effect."""
    every, changed = checkpoint.every, first_changed(checkpoint, ("asynchronous", "keep_last", "keep_every", "keep_best"))
    require(
        every or not changed,
        f"checkpoint.{changed}={getattr(checkpoint, changed, '')} has no effect with checkpoint.every=0, which makes no checkpoints; set "
        "checkpoint.every",
    )
    for name in ("keep_every", "keep_best"):
        require(
            checkpoint.keep_last or not getattr(checkpoint, name),
            f"checkpoint.{name}={getattr(checkpoint, name)} has no effect with checkpoint.keep_last=0, which keeps all; set one of them",
        )
    require(
        not checkpoint.keep_every or checkpoint.keep_every % every == 0,
        f"checkpoint.keep_every={checkpoint.keep_every} is not a multiple of checkpoint.every={every}: set it to one",
    )
