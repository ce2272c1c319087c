"""The losses of one response in float64 torch, written from their definitions: gradients come from autograd over these few lines.

ASPO is written as its authors do (inverted ratio through π_old·π / sg(π²), three `where`s), not as the project does.
"""

import torch
from torch import Tensor


def aspo(logprobs: Tensor, old: Tensor, advantage: float, low_entropy: Tensor, *, eps_low_class=0.2, eps_high_class=0.4, cap=3.0) -> Tensor:
    ratio = (logprobs - old).exp()
    eps = torch.full_like(ratio, eps_high_class).masked_fill(low_entropy, eps_low_class).detach()
    if advantage < 0:
        weight = torch.where(ratio.detach() > cap, cap * ratio / ratio.detach(), ratio)
        stopped, constant = ratio.detach() < 1 - eps, 1 - eps
    else:
        flipped = (old - 2 * logprobs.detach() + logprobs).exp()
        weight = torch.where(flipped.detach() > cap, cap * flipped / flipped.detach(), flipped)
        stopped, constant = ratio.detach() > 1 + eps, 1 / (1 + eps)
    return torch.where(stopped, -advantage * constant, -advantage * weight)


def ppo_clip(logprobs: Tensor, old: Tensor, advantage: float, low_entropy: Tensor, *, eps=0.2, cap=3.0) -> Tensor:
    ratio = (logprobs - old).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - eps, 1 + eps) * advantage)
    return -torch.maximum(surrogate, torch.tensor(cap * advantage).double()) if advantage < 0 else -surrogate


def low_entropy(entropy: Tensor, quantile: float = 0.8) -> Tensor:
    ordered = entropy.detach().sort().values
    position = quantile * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return entropy.detach() <= ordered[below] + (position - below) * (ordered[above] - ordered[below])


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    x = reference - logprobs
    return x.exp() - x - 1


def adamw_first_step(weight: Tensor, gradient: Tensor, *, lr: float, eps: float, weight_decay: float, beta1=0.9, beta2=0.999) -> Tensor:
    """Return the weight after the first AdamW update, bias correction written out."""
    decay = weight_decay if weight.dim() > 1 else 0.0
    m, v = (1 - beta1) * gradient / (1 - beta1), (1 - beta2) * gradient**2 / (1 - beta2)
    return weight * (1 - lr * decay) - lr * m / (v.sqrt() + eps)
