"""Find the policy loss that a configuration names, and bind its options: a built-in loss, or a function of the user's.

`megatron-aspo check-loss` tries a custom one.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.import_path import check_call, load_function
from megatron_aspo.losses import registry
from megatron_aspo.losses.declaration import Declaration
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.policy import PolicyLoss, PolicyTerm, PolicyTokens


def find_policy_loss(options: AlgorithmOptions) -> PolicyLoss:
    """Return the loss with its options bound.

    Raises UserError if the function cannot be loaded, does not take its options, or declares what its source does not show.
    """
    name, given = options.policy_loss, options.policy_loss_options
    function = load_function(registry.POLICY_LOSSES.get(name, name), "algorithm.policy_loss")
    signature = f"(tokens{''.join(f', {option}=…' for option in given)})"
    check_call(function, name, "algorithm.policy_loss", signature, None, **given)
    declared: Declaration | None = getattr(function, "declaration", None)
    if declared and declared != registry.declaration(name):
        raise UserError(
            f"algorithm.policy_loss={name}: what the function declares cannot be read from its source; define it by a plain def at the top "
            "of the module that the path names, with no decorator but declares(…) and literal arguments"
        )
    return partial(_call, function, name, given)


def _call(function: Callable, name: str, options: Mapping[str, Any], tokens: PolicyTokens) -> PolicyTerm:
    result = function(tokens, **options)
    term = vars(result) if isinstance(result, PolicyTerm) else {"loss": result}
    for part, values in term.items():
        if not isinstance(values, Tensor) or values.shape != tokens.logprobs.shape:
            got = f"a tensor of shape {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise ValueError(f"{name} returned {got} as {part}, expected a value for each of {tokens.logprobs.numel()} tokens")
    return result if isinstance(result, PolicyTerm) else _term(result, tokens)


def _term(loss: Tensor, tokens: PolicyTokens) -> PolicyTerm:
    """Return a bare loss with the metrics that its gradient shows: w = −(∂L/∂logp) / A, and a token is masked where that is 0."""
    advantages = tokens.advantages
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss.sum(), tokens.logprobs, retain_graph=True, materialize_grads=True)
    else:
        gradient = torch.zeros_like(advantages)
    signed = advantages != 0
    weight = torch.where(signed, -gradient / torch.where(signed, advantages, 1.0), 0.0)
    masked = signed & (gradient == 0)
    return PolicyTerm(loss, weight, masked, capped=torch.zeros_like(masked))
