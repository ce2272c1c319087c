"""Declarations beside a policy loss: the parts of the objective that it needs, and the bounds of its options. Imports no torch.

    @declares(entropy_classes=True)
    def my_loss(tokens: PolicyTokens, *, clip_low: LowerClip = 0.2, cap: Cap = 3.0) -> Tensor:

`signature.py` reads both from the source, so that a recipe is checked without importing torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import Field

from megatron_aspo.common.options import Rule

Function = TypeVar("Function", bound=Callable)


@dataclass(frozen=True)
class Declaration:
    entropy_classes: bool = False
    """The loss reads `tokens.low_entropy`, so `algorithm.low_entropy_quantile` and `entropy_quantile_scope` have an effect."""
    kl_by_entropy_class: bool = False
    """The KL term of high-entropy tokens is weighted by `algorithm.high_entropy_kl_coef`, that of low-entropy tokens by `kl_coef`."""
    ratio: bool = True
    """The loss compares the policy with the old one, so `algorithm.old_logprobs` has an effect."""
    aggregation: str = "token_mean"
    """Default of `algorithm.aggregation` under this loss."""


CUSTOM = Declaration(entropy_classes=True)
"""Declaration of a custom loss that declares nothing: it may read the entropy classes."""


def declares(**declared: Any) -> Callable[[Function], Function]:
    """Mark a policy loss with a `Declaration`. Its arguments must be literals; the function itself is returned unchanged."""
    declaration = Declaration(**declared)

    def mark(function: Function) -> Function:
        function.declaration = declaration
        return function

    return mark


LowerClip = Annotated[float, Field(ge=0, le=1), Rule("must be at most 1: a ratio is positive", "le")]
"""ε of a lower bound 1 − ε on the ratio."""
UpperClip = Annotated[float, Field(ge=0)]
"""ε of an upper bound 1 + ε on the ratio."""
Cap = Annotated[float, Field(gt=1), Rule("must be greater than 1, the weight on policy")]
"""Upper bound of a token's weight."""
OPTION_TYPES = {"LowerClip": LowerClip, "UpperClip": UpperClip, "Cap": Cap}
"""Annotations of options that carry bounds, by name."""
