"""Batches on which a policy loss is tried, and how it is evaluated and compared on them. The checks themselves: check_loss.py."""

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_aspo.common.import_path import one_line
from megatron_aspo.losses import find
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.policy import LOG_RATIO_BOUND, PolicyLoss, PolicyTerm, PolicyTokens
from megatron_aspo.losses.terms import low_entropy_tokens

FLOATS = ("logprobs", "old_logprobs", "advantages", "entropy")
Evaluated = tuple[Tensor, Tensor]
"""Losses and gradient, both [tokens]: the derivative of the weighted sum of all losses by a token's logprob, divided by the token's own
weight. Where losses do not look at other tokens it is the derivative of the token's own."""


class Broken(Exception):
    """A check that failed: what was seen, and the cure."""

    def __init__(self, seen: str, cure: str):
        super().__init__(f"{seen}\n{cure}")


# --- batches ------------------------------------------------------------------------------------------------------------------------------


def ordinary() -> PolicyTokens:
    """Six responses, all 40 tokens counted, r from 0.08 to 12 for both signs of A; float64, of values that float32 holds too."""
    responses = {6: 1.3, 1: -0.4, 9: 0.6, 4: 0.9, 12: -1.7, 8: -0.8}  # length: advantage
    n = sum(responses)
    random = torch.Generator().manual_seed(0)
    log_ratio = torch.linspace(-2.5, 2.5, n)[torch.randperm(n, generator=random)] + 0.02 * torch.rand(n, generator=random)
    old = -2.6 - 3 * torch.rand(n, generator=random)
    advantages = torch.tensor([advantage for length, advantage in responses.items() for _ in range(length)])
    entropy = 2 * torch.rand(n, generator=random)
    return _tokens(old + log_ratio, old, advantages, entropy, torch.ones(n, dtype=torch.bool), [0, *accumulate(responses)])


def extreme() -> PolicyTokens:
    """Return tokens with A = 1, −1 and 0: r = 1, certain, hopeless, and log-ratios over the bound; each is followed by an uncounted one."""
    pairs = [(-1.0, -1.0), (0.0, 0.0), (-100.0, -100.0), (-0.001, -100.0), (-100.0, -0.001), (-1.0, -26.0), (-26.0, -1.0)]
    logprobs, old = torch.tensor([pair for pair in pairs for _ in range(2)] * 3).unbind(1)
    n = len(logprobs)
    advantages = torch.tensor([advantage for advantage in (1.0, -1.0, 0.0) for _ in range(2 * len(pairs))])
    return _tokens(logprobs, old, advantages, (logprobs != 0).float(), torch.arange(n) % 2 == 0, list(range(0, n + 1, 2)))


def counting(tokens: PolicyTokens, mask: Tensor) -> PolicyTokens:
    """Return the same batch with this mask, bool [tokens]."""
    return _tokens(tokens.logprobs, tokens.old_logprobs, tokens.advantages, tokens.entropy, mask, tokens.offsets)


def some(tokens: PolicyTokens) -> PolicyTokens:
    """The same batch with every third token not counted."""
    return counting(tokens, torch.arange(len(tokens.mask)) % 3 != 1)


def cut(tokens: PolicyTokens, first: int, last: int) -> PolicyTokens:
    """Responses first … last − 1."""
    start, stop = tokens.offsets[first], tokens.offsets[last]
    parts = {name: values[start:stop] for name, values in tensors(tokens).items()}
    return replace(tokens, **parts, offsets=[offset - start for offset in tokens.offsets[first : last + 1]])


def cast(tokens: PolicyTokens, dtype: torch.dtype) -> PolicyTokens:
    return replace(tokens, **{name: getattr(tokens, name).to(dtype) for name in FLOATS})


def tensors(tokens: PolicyTokens) -> dict[str, Tensor]:
    """Field → tensor."""
    return {f.name: getattr(tokens, f.name) for f in fields(tokens) if isinstance(getattr(tokens, f.name), Tensor)}


def fresh(tokens: PolicyTokens) -> tuple[PolicyTokens, Tensor]:
    """A copy to hand to a loss, which may write to it, and the leaf of its logprobs, which are none themselves, as in training."""
    copies = {name: values.clone() for name, values in tensors(tokens).items()}
    leaf = copies["logprobs"].requires_grad_()
    return replace(tokens, **copies | {"logprobs": leaf.clone()}, offsets=list(tokens.offsets)), leaf


def _tokens(logprobs, old_logprobs, advantages, entropy, mask: Tensor, offsets: list[int]) -> PolicyTokens:
    """As the trainer hands them over: zeros where no token counts."""
    floats = [torch.where(mask, values.float().double(), 0.0) for values in (logprobs, old_logprobs, advantages, entropy)]
    low = low_entropy_tokens(floats[3], mask, offsets, AlgorithmOptions.low_entropy_quantile)
    logprobs, old_logprobs, advantages, entropy = floats
    return PolicyTokens(logprobs, old_logprobs, advantages, entropy, low, mask, offsets)


# --- evaluation ---------------------------------------------------------------------------------------------------------------------------


def sum_weights(tokens: PolicyTokens) -> Tensor:
    """Return the weights of the sum that is differentiated: 0 on uncounted tokens, else uneven; each depends on its own token only."""
    return tokens.mask * (1 + tokens.entropy)


def evaluate(loss: PolicyLoss, tokens: PolicyTokens, given: str = "ordinary tokens", cure: str = "Correct the function.") -> Evaluated:
    """The loss on a copy of these tokens. `given` names the batch in messages, `cure` is against exceptions."""
    copy, leaf = fresh(tokens)
    with telling(given, cure):
        losses = loss(copy).loss
        if not losses.requires_grad:
            return losses.clone(), torch.zeros_like(leaf)
        weights = sum_weights(tokens)
        (gradient,) = torch.autograd.grad((weights * losses).sum(), leaf, allow_unused=True)
        return losses.detach().clone(), torch.zeros_like(leaf) if gradient is None else gradient / weights.where(tokens.mask, 1.0)


@contextlib.contextmanager
def telling(given: str, cure: str = "Correct the function.") -> Iterator[None]:
    """Whatever the loss raises becomes Broken, with the line of the user's that raised it."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's own code may raise anything, SystemExit too
        frames = traceback.extract_tb(error.__traceback__)
        if frames[-1].filename == find.__file__:  # says itself what is wrong with the result
            raise Broken(f"given {given}, {error}", "Return the loss of every token; it is the trainer that takes the mean.") from error
        libraries = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
        own = [frame for frame in frames if not frame.filename.startswith(libraries)]
        at = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
        raise Broken(f"given {given}, it raised {one_line(error)}{at}", cure) from error


class Stops(TorchFunctionMode):
    """Keeps what `.detach()` returns, call by call; or gives out again what another run kept, as if the logprobs had never moved."""

    def __init__(self, kept: list[Tensor] | None = None):
        super().__init__()
        self.results: list[Tensor] = []
        self._kept = kept
        self._strayed = False

    @property
    def strayed(self) -> bool:
        """Whether this run called `.detach()` on other things than the one whose results it was given."""
        return self._strayed or (self._kept is not None and len(self.results) != len(self._kept))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # Without gradients nothing is stopped: the inside of a torch.autograd.Function, where .detach() is no more than a copy.
        if function not in (Tensor.detach, Tensor.detach_, torch.detach, torch.detach_) or not torch.is_grad_enabled():
            return result
        at = len(self.results)
        self.results.append(result.clone())
        if self._kept is None:
            return result
        if at >= len(self._kept) or self._kept[at].shape != result.shape:
            self._strayed = True
            return result
        return result.copy_(self._kept[at]) if function in (Tensor.detach_, torch.detach_) else self._kept[at].clone()

    def around(self, loss: PolicyLoss) -> PolicyLoss:
        def call(tokens: PolicyTokens) -> PolicyTerm:
            with self:
                return loss(tokens)

        return call


# --- what is required of it ---------------------------------------------------------------------------------------------------------------


def name_token(tokens: PolicyTokens, i: int) -> str:
    """How messages name token i."""
    response = next(n for n, stop in enumerate(tokens.offsets[1:]) if i < stop)
    ratio = (tokens.logprobs - tokens.old_logprobs)[i].double().exp()
    what = f"A = {tokens.advantages[i]:.4g}, r = {ratio:.4g}, logprob = {tokens.logprobs[i]:.4g}"
    return f"token {i - tokens.offsets[response]} of response {response} ({what if tokens.mask[i] else 'not counted: all inputs are 0'})"


def require_equal(tokens: PolicyTokens, a: Evaluated, b: Evaluated, tolerance: float, names: tuple[str, str], cure: str) -> None:
    """Raises Broken unless losses and gradients of the counted tokens are equal, to `tolerance` of their own or their mean size."""
    for what, x, y in zip(("loss", "gradient"), a, b, strict=True):
        difference, size = (x.double() - y.double()).abs(), y.double().abs()
        differ = tokens.mask & ~(difference <= tolerance * size.clamp(min=float(size[tokens.mask].mean())))
        if differ.any():
            i = int(torch.where(differ, difference.nan_to_num(torch.inf), -1.0).argmax())
            digits = 6 if f"{x[i]:.6g}" != f"{y[i]:.6g}" else 17
            raise Broken(f"{name_token(tokens, i)}: {what} {x[i]:.{digits}g} {names[0]}, {y[i]:.{digits}g} {names[1]}", cure)


def require_finite(tokens: PolicyTokens, evaluated: Evaluated) -> None:
    """Raises Broken for a loss or gradient that is not, counted or not."""
    for what, values in zip(("loss", "gradient"), evaluated, strict=True):
        bad = ~values.isfinite()
        if bad.any():
            i = int((bad & tokens.mask if (bad & tokens.mask).any() else bad).nonzero()[0])
            if not tokens.mask[i]:
                cure = "The sum over tokens multiplies what does not count by 0, and 0 × nan is nan: stay finite there."
            elif tokens.advantages[i] == 0:
                cure = "Groups of equal rewards have A = 0: stay finite there, without dividing by A."
            elif (tokens.logprobs - tokens.old_logprobs)[i].abs() > LOG_RATIO_BOUND:
                cure = "Take the ratio from tokens.log_ratio, which is bounded to ±20."
            else:
                cure = "Stay finite there; autograd also needs the branches finite that torch.where does not take."
            raise Broken(f"{name_token(tokens, i)}: the {what} is {values[i]} in {str(values.dtype)[6:]}", cure)
