"""A policy loss of one's own, whole: SAPO, Soft Adaptive Policy Optimization (arXiv 2511.20347).

    megatron-aspo check-loss examples.losses.sapo:sapo
    megatron-aspo train RECIPE algorithm.policy_loss=examples.losses.sapo:sapo algorithm.aggregation=seq_mean_token_mean

PPO-Clip drops a token at once when its ratio r leaves the clip range. SAPO lets it fade: in place of r stands a gate
f(r) = σ(τ·(r − 1))·4/τ, and the gradient's weight r·f′(r) is 1 at r = 1 and goes to 0 on both sides. A larger τ fades faster. Tokens with
A < 0 get the larger one: pushing one token down lifts all others a little, which disturbs more than the opposite.
"""

import torch
from torch import Tensor

from megatron_aspo.losses.policy import PolicyTokens


def sapo(tokens: PolicyTokens, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Tensor:
    """−A·f(r) of each token, [tokens]. The options are algorithm.policy_loss_options of a recipe."""
    ratio = tokens.log_ratio.exp()  # with gradient; Δ is bounded to ±20
    # Not torch.where(…, tau_pos, tau_neg), which would round both numbers to float32.
    tau = torch.full_like(ratio, tau_neg).masked_fill(tokens.advantages > 0, tau_pos)
    gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    return -tokens.advantages * gate  # one loss a token: the trainer masks, corrects and takes the mean
