"""Policy losses as a user would write them, right and wrong."""

import sys

import torch

from megatron_aspo.losses.policy import PolicyTerm, PolicyTokens

seen: list[PolicyTokens] = []
"""What `keep` got."""
not_a_function = 3


def keep(tokens):
    seen.append(tokens)
    return -tokens.advantages * tokens.logprobs


def weighted(tokens, *, weight: float = 0.5, floor: float = -100.0):
    """−A · weight · logp, and no gradient under logp = floor."""
    return -tokens.advantages * weight * tokens.logprobs.clamp(min=floor)


def per_response(tokens):
    """−A times the mean log-ratio of the response: no token's gradient is its own alone."""
    return -tokens.advantages * tokens.response_means(tokens.log_ratio)


def with_figures(tokens):
    loss = -tokens.advantages * tokens.logprobs
    return PolicyTerm(
        loss,
        weight=torch.full_like(loss, 0.25).detach(),
        masked=torch.zeros_like(loss, dtype=torch.bool),
        capped=tokens.advantages > 0,
    )


def constant(tokens):
    return torch.ones_like(tokens.advantages)


def number(tokens):
    return 0.5


def total(tokens):
    return (-tokens.advantages * tokens.logprobs).sum()


def term_of_a_number(tokens):
    return PolicyTerm(None, None, None, None)


def one_weight(tokens):
    none = torch.zeros_like(tokens.mask)
    return PolicyTerm(-tokens.advantages * tokens.logprobs, torch.ones(1), none, none)


def raising(tokens):
    raise KeyError("two\nlines")


def exiting(tokens):
    sys.exit(0)


def not_a_number(tokens):
    """Infinite on the second token."""
    return -tokens.advantages * tokens.logprobs / (torch.arange(len(tokens.mask)) != 1)


def stopped(tokens):
    return -tokens.advantages * tokens.logprobs.detach()


def elsewhere(tokens):
    """A gradient, but not of the policy."""
    return -tokens.advantages * torch.ones_like(tokens.advantages).requires_grad_()


def column(tokens):
    return (-tokens.advantages * tokens.logprobs)[:, None]


async def waiting(tokens):
    return tokens.logprobs
