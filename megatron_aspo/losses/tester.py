"""`megatron-aspo check-loss`: tries a policy loss on small batches, before a run does. It needs torch alone: no model, no process group.

Each check is a function that returns what it has established, or raises Broken with what it saw and the cure. They are about what the
trainer relies on: a token's loss depends on the counted tokens of its own response and on nothing else, it is finite wherever a policy may
go, and its gradient is the derivative, with everything that `.detach()` returns held constant.
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
import yaml

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.strict_yaml import number_if_one
from megatron_aspo.losses.check import check_algorithm
from megatron_aspo.losses.find import find_policy_loss
from megatron_aspo.losses.policy import PolicyLoss
from megatron_aspo.losses.section import algorithm_options
from megatron_aspo.losses.trial_batches import (
    Broken,
    Stops,
    cast,
    counting,
    cut,
    evaluate,
    extreme,
    fresh,
    name_token,
    ordinary,
    require_equal,
    require_finite,
    some,
    sum_weights,
    telling,
    tensors,
)

STEP = 1e-6
"""By how much a logprob is moved up and down for the difference quotients."""


def check_loss(name: str, given: Sequence[str] = ()) -> bool:
    """Try the policy loss `name` with its options `given`, each `option=value`; print a line for each check and last one JSON object.

    Returns whether all checks passed. Raises UserError if there is no such loss, or it does not take these options.
    """
    options = algorithm_options(policy_loss=name, policy_loss_options=dict(map(_option, given)))
    check_algorithm(options, responses_per_prompt=2, max_response_tokens=1)
    loss = find_policy_loss(options)
    passed: dict[str, bool] = {}
    # What torch.compile made must run where its calls of .detach() can be seen.
    with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext():
        for check, function in CHECKS.items():
            try:
                said, passed[check] = f"ok      {function(loss)}", True
            except Broken as broken:
                said, passed[check] = "FAILED  " + str(broken).replace("\n", f"\n{'':19}"), False
            print(f"{check:10} {said}", flush=True)
            if not passed["result"]:
                print("The other checks need a result and were not tried.")
                break
    whole = all(passed.values())
    print(json.dumps({"loss": name, "options": options.policy_loss_options, "passed": whole, "checks": passed}, default=str))
    return whole


def _option(text: str) -> tuple[str, object]:
    """Name and value, the value read as a recipe would."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UserError(f"{text!r} is not of the form option=value")
    try:
        read = yaml.safe_load(value) if value else ""
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{text!r}: the value is not valid YAML") from error
    return name, number_if_one(read)


def _result(loss: PolicyLoss) -> str:
    for dtype in (torch.float64, torch.float32):
        tokens = cast(ordinary(), dtype)
        with telling("ordinary tokens", "Correct the function, or the options that it is given."):
            term = loss(fresh(tokens)[0])
        if term.loss.dtype != dtype:
            raise Broken(f"{dtype} tokens gave a {term.loss.dtype} loss", "Make constants by tokens.logprobs.new_tensor(…); do not cast.")
        first = evaluate(loss, tokens)
        require_finite(tokens, first)
        names, cure = ("at the second call", "at the first"), "A loss must depend on its arguments alone, without randomness or memory."
        require_equal(tokens, evaluate(loss, tokens), first, 0.0, names, cure)
    return "one finite loss for each token, in the tokens' dtype, the same at every call"


def _extremes(loss: PolicyLoss) -> str:
    for dtype in (torch.float64, torch.float32):
        tokens = cast(extreme(), dtype)
        require_finite(tokens, evaluate(loss, tokens, "extreme tokens"))
    return "finite with A = 0, r = 1, log-ratios of ±100, logprobs of 0 and −100, and where no token counts"


def _gradient(loss: PolicyLoss) -> str:
    tokens, base = ordinary(), Stops()
    weights = sum_weights(tokens)
    losses, gradient = evaluate(base.around(loss), tokens)
    if not gradient.any():
        raise Broken("no token has a gradient", "Nothing in it follows tokens.logprobs: is all of it .detach(), .data or numpy?")
    sides = []
    for i in range(len(losses)):
        for step in (-STEP, STEP):
            logprobs = tokens.logprobs.clone()
            logprobs[i] += step
            again = Stops(base.results)
            moved, _ = evaluate(again.around(loss), replace(tokens, logprobs=logprobs))
            if again.strayed:
                seen = f"{name_token(tokens, i)}: with its logprob moved by {step:.0e}, .detach() was called on other things than before"
                raise Broken(seen, "Call .detach() on the same things at every call, so that it can be told what is held constant.")
            sides.append((weights / weights[i] * (moved - losses)).sum() / (logprobs - tokens.logprobs)[i])
    # Left and right differ at a kink, where autograd may take any value between.
    sides = torch.stack(sides).view(-1, 2)
    outside = torch.maximum(sides.amin(1) - gradient, gradient - sides.amax(1))
    size = torch.maximum(gradient.abs(), sides.abs().amax(1))
    excess = outside - 1e-5 * size - 1e-8 * torch.maximum(losses.abs().max(), gradient.abs().max())
    if not (excess <= 0).all():
        i = int(excess.nan_to_num(torch.inf).argmax())
        raise Broken(
            f"{name_token(tokens, i)}: autograd gives {gradient[i]:.8g}, finite differences {sides[i].mean():.8g}",
            "Gradient is lost in .item(), float(), .data, numpy, a new tensor or torch.no_grad(), rounded by a cast, or wrong in a\n"
            "backward of your own. Use .detach(), not under no_grad, on what is meant to be constant.",
        )
    return f"autograd agrees with finite differences in float64 at {len(losses)} tokens, what .detach() returns held constant"


def _float32(loss: PolicyLoss) -> str:
    tokens = ordinary()
    cure = "Avoid differences of large numbers and of exponentials: torch.expm1, torch.log1p, logsigmoid."
    single = evaluate(loss, cast(tokens, torch.float32))
    require_equal(tokens, single, evaluate(loss, tokens), 1e-4, ("in float32", "in float64"), cure)
    return "agrees with float64 to 1e-4"


def _splitting(loss: PolicyLoss) -> str:
    tokens = some(ordinary())
    whole = evaluate(loss, tokens)
    last = len(tokens.offsets) - 1
    for edges in (range(last + 1), (0, 2, last), (0, 1, 4, last)):
        parts = [evaluate(loss, cut(tokens, a, b), "part of the batch") for a, b in zip(edges[:-1], edges[1:], strict=True)]
        names = (f"when the batch is cut into {len(parts)}", "in the whole batch")
        cure = (
            "A token may depend on its own response only (tokens.offsets, tokens.response_means). A loss that depends on how a batch is\n"
            "cut gives other results with every micro-batch size and number of ranks."
        )
        losses, gradients = (torch.cat(values) for values in zip(*parts, strict=True))
        require_equal(tokens, (losses, gradients), whole, 1e-12, names, cure)
    return "each response has the same losses and gradients alone and in every company"


def _mask(loss: PolicyLoss) -> str:
    full = ordinary()
    tokens = some(full)
    other = replace(full, mask=tokens.mask, low_entropy=tokens.low_entropy ^ ~tokens.mask)
    names = ("with zeros on the tokens that do not count", "with other numbers there")
    cure = "Take sums and means over tokens.mask only; tokens.response_means does."
    require_equal(tokens, evaluate(loss, tokens, "tokens of which some do not count"), evaluate(loss, other), 1e-12, names, cure)
    return "what stands on tokens that do not count changes no other token"


def _empty(loss: PolicyLoss) -> str:
    tokens = ordinary()
    cure = "Let it give no loss, not an error or nan: divide by max(count, 1), take no maximum of nothing."
    last, end = len(tokens.offsets) - 2, tokens.offsets[-2]
    hollow = counting(tokens, torch.arange(len(tokens.mask)) < end)
    longer = replace(tokens, offsets=sorted([*tokens.offsets, 0, end, tokens.offsets[-1]]))
    for batch, given, same in (
        (hollow, "a response of which no token counts", cut(tokens, 0, last)),
        (longer, "responses without tokens", tokens),
    ):
        losses, gradients = evaluate(loss, batch, given, cure)
        require_finite(batch, (losses, gradients))
        beside = losses[: len(same.mask)], gradients[: len(same.mask)]
        require_equal(same, beside, evaluate(loss, same), 1e-12, (f"beside {given}", "without"), cure)
    for offsets in ([0], [0, 0]):
        evaluate(loss, replace(cut(tokens, 0, 0), offsets=offsets), "no token at all", cure)
    return "responses without tokens, without counted tokens, and no response at all"


def _inputs(loss: PolicyLoss) -> str:
    tokens = some(ordinary())
    given, _ = fresh(tokens)
    handed = tensors(given)
    versions = {name: values._version for name, values in handed.items()}
    with telling("ordinary tokens"):
        loss(given)
    # A write that left the numbers as they were may not do so next time.
    changed = [n for n, values in handed.items() if values._version != versions[n] or not torch.equal(values, getattr(tokens, n))]
    if given.offsets != tokens.offsets:
        changed.append("offsets")
    if changed:
        seen = " and ".join(f"tokens.{name}" for name in changed) + " was written to"
        raise Broken(seen, "Work on new tensors: KL, correction and logged figures read these after the loss.")
    return "left as they were"


CHECKS = {
    "result": _result,
    "extremes": _extremes,
    "gradient": _gradient,
    "float32": _float32,
    "splitting": _splitting,
    "mask": _mask,
    "empty": _empty,
    "inputs": _inputs,
}
