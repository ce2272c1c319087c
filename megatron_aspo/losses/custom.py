"""The policy loss that a configuration names: one of ours, or a function of the user's own.

    def my_loss(tokens: PolicyTokens, *, an_option: float = 1.0) -> Tensor | PolicyTerm

It returns the loss of each token, [tokens]; `algorithm.policy_loss_options` gives its keyword arguments. `megatron-aspo check-loss` tries
one.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_aspo.common.import_path import check_call, load_function
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.policy import POLICY_LOSSES, PolicyLoss, PolicyTerm, PolicyTokens


def find_policy_loss(options: AlgorithmOptions) -> PolicyLoss:
    """Raises UserError if the user's function cannot be loaded or does not take its options."""
    if options.policy_loss in POLICY_LOSSES:
        return POLICY_LOSSES[options.policy_loss]
    function = load_function(options.policy_loss, "algorithm.policy_loss")
    given = options.policy_loss_options
    signature = f"(tokens{''.join(f', {name}=…' for name in given)})"
    check_call(function, options.policy_loss, "algorithm.policy_loss", signature, None, **given)
    return partial(_call, function, options)


def _call(function: Callable, options: AlgorithmOptions, tokens: PolicyTokens) -> PolicyTerm:
    result = function(tokens, **options.policy_loss_options)
    term = vars(result) if isinstance(result, PolicyTerm) else {"loss": result}
    for name, values in term.items():
        if not isinstance(values, Tensor) or values.shape != tokens.logprobs.shape:
            got = f"a tensor of shape {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise ValueError(
                f"{options.policy_loss} returned {got} as {name}, expected a value for each of {tokens.logprobs.numel()} tokens"
            )
    return result if isinstance(result, PolicyTerm) else _term(result, tokens)


def _term(loss: Tensor, tokens: PolicyTokens) -> PolicyTerm:
    """A bare loss with the figures that its gradient shows: w = −(∂L/∂logp) / A, and a token is masked where that is 0."""
    advantages = tokens.advantages
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss.sum(), tokens.logprobs, retain_graph=True, materialize_grads=True)
    else:
        gradient = torch.zeros_like(advantages)
    signed = advantages != 0
    weight = torch.where(signed, -gradient / torch.where(signed, advantages, 1.0), 0.0)
    masked = signed & (gradient == 0)
    return PolicyTerm(loss, weight, masked, capped=torch.zeros_like(masked))
