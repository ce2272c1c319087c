"""REINFORCE: the plain policy gradient."""

import torch

from megatron_aspo.losses.declaration import declares
from megatron_aspo.losses.policy import PolicyTerm, PolicyTokens


@declares(ratio=False)
def reinforce(tokens: PolicyTokens) -> PolicyTerm:
    """The plain policy gradient: no weight, no bound.

        L = −A · log π

    Nothing holds a token back. The loss is sound on policy (`epochs: 1`, one mini-batch per step), and it is the baseline for what the
    ratio buys.
    """
    none = torch.zeros_like(tokens.logprobs, dtype=torch.bool)
    return PolicyTerm(-tokens.advantages * tokens.logprobs, torch.ones_like(tokens.logprobs), none, none)
