"""`megatron-aspo check-loss`: every way to break a policy loss is seen by the check that is about it, and nothing sound is refused."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_aspo.common.errors import UserError
from megatron_aspo.losses.policy import PolicyTerm, PolicyTokens
from megatron_aspo.losses.registry import POLICY_LOSSES
from megatron_aspo.losses.tester import check_loss
from megatron_aspo.losses.trial_batches import extreme, ordinary

ROOT = Path(__file__).parents[2]
ALL = {"result", "extremes", "gradient", "float32", "mask", "empty", "splitting", "inputs"}


def report(capsys, name: str, *given: str) -> tuple[str, set[str]]:
    """What was printed, and the names of the checks that failed."""
    passed = check_loss(name if name in POLICY_LOSSES else f"{__name__}:{name}", given)
    text = capsys.readouterr().out
    last = json.loads(text.splitlines()[-1])
    assert last["passed"] == passed == all(last["checks"].values())
    failed = {check for check, ok in last["checks"].items() if not ok}
    assert set(last["checks"]) == ({"result"} if "result" in failed else ALL)
    assert {line.split()[0] for line in text.splitlines() if " FAILED " in line} == failed
    return text, failed


# --- sound losses -------------------------------------------------------------------------------------------------------------------------


def plain(tokens: PolicyTokens, *, scale: float = 1.0) -> Tensor:
    return -scale * tokens.advantages * tokens.log_ratio.exp()


def stopped(tokens: PolicyTokens) -> Tensor:
    """Every spelling of stop-gradient, numpy on what is stopped, and a call of a kind that stops nothing."""
    ratio = tokens.log_ratio.exp()
    weight = tokens.logprobs.new_tensor(np.minimum(ratio.detach().numpy(), 3.0))
    carrier = (tokens.logprobs - torch.detach(tokens.logprobs)).exp()
    other = (tokens.logprobs * 2).detach_()
    tokens.entropy.detach()
    return -tokens.advantages * (weight * carrier + other * ratio)


def of_the_response(tokens: PolicyTokens) -> Tensor:
    """GSPO in its sequence form: the gradient of every token goes through all tokens of its response."""
    return -tokens.advantages * tokens.response_means(tokens.log_ratio).exp()


def only_praise(tokens: PolicyTokens) -> Tensor:
    return -torch.where(tokens.advantages > 0, tokens.advantages, 0.0) * tokens.logprobs


def also_without_advantage(tokens: PolicyTokens) -> Tensor:
    return plain(tokens) + 0.1 * tokens.log_ratio**2


def kinked(tokens: PolicyTokens) -> Tensor:
    """Kinks exactly at and 3e-7 beside every token."""
    at = tokens.log_ratio.detach()
    return plain(tokens) + torch.relu(tokens.log_ratio - at) + (tokens.log_ratio - at - 3e-7).abs()


class Square(torch.autograd.Function):
    """Right, though its forward calls .detach()."""

    factor = 2.0

    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x.detach() ** 2

    @classmethod
    def backward(cls, context, gradient):
        return cls.factor * context.saved_tensors[0] * gradient


def own_backward(tokens: PolicyTokens) -> Tensor:
    return -tokens.advantages * Square.apply(tokens.log_ratio + 3)


def whole_term(tokens: PolicyTokens) -> PolicyTerm:
    none = torch.zeros_like(tokens.mask)
    return PolicyTerm(plain(tokens), tokens.log_ratio.exp().detach(), none, none)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_every_loss_of_ours_passes(capsys, name):
    assert report(capsys, name)[1] == set()


@pytest.mark.parametrize(
    "loss",
    [plain, stopped, of_the_response, only_praise, also_without_advantage, kinked, own_backward, whole_term],
    ids=lambda f: f.__name__,
)
def test_a_sound_loss_is_not_refused(capsys, loss):
    assert report(capsys, loss.__name__)[1] == set()


@pytest.mark.parametrize("scale", ["1.0e-9", "1.0e+9"])
def test_the_size_of_the_losses_does_not_matter(capsys, scale):
    assert report(capsys, "plain", f"scale={scale}")[1] == set()


def test_a_compiled_loss_can_be_checked(capsys, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "compiled", torch.compile(stopped), raising=False)
    assert report(capsys, "compiled")[1] == set()


# --- broken losses ------------------------------------------------------------------------------------------------------------------------


def item(tokens: PolicyTokens) -> Tensor:
    weight = torch.stack([tokens.logprobs.new_tensor(r.item()) for r in tokens.log_ratio.exp()] or [tokens.logprobs]).view(-1)
    return -tokens.advantages * weight * tokens.logprobs


def one_item(tokens: PolicyTokens) -> Tensor:
    """Right but for token 7 of the batch."""
    factors = tokens.logprobs.new_ones(len(tokens.mask))
    factors[7:8] = tokens.logprobs[7:8].sum().item()
    return plain(tokens) * factors


def data(tokens: PolicyTokens) -> Tensor:
    return -tokens.advantages * tokens.log_ratio.exp().data * tokens.logprobs


def through_numpy(tokens: PolicyTokens) -> Tensor:
    return -tokens.advantages * torch.from_numpy(np.exp(tokens.log_ratio.data.numpy())) * tokens.logprobs


def no_grad(tokens: PolicyTokens) -> Tensor:
    with torch.no_grad():
        weight = tokens.log_ratio.exp()
    return -tokens.advantages * weight * tokens.logprobs


def no_grad_detach(tokens: PolicyTokens) -> Tensor:
    with torch.no_grad():
        weight = tokens.log_ratio.exp().detach()
    return -tokens.advantages * weight * tokens.logprobs


def new_tensor(tokens: PolicyTokens) -> Tensor:
    weight = tokens.log_ratio.exp()
    return -tokens.advantages * weight.new_tensor(weight.tolist()) * tokens.logprobs


def whole_in_numpy(tokens: PolicyTokens) -> Tensor:
    return torch.from_numpy(-tokens.advantages.numpy() * np.exp(tokens.log_ratio.detach().numpy()))


class Cube(Square):
    """A backward that is 0.01 % off."""

    factor = 2.0002


def wrong_backward(tokens: PolicyTokens) -> Tensor:
    return -tokens.advantages * Cube.apply(tokens.log_ratio + 3)


def hook(tokens: PolicyTokens) -> Tensor:
    ratio = tokens.log_ratio.exp()
    if ratio.requires_grad:
        ratio.register_hook(lambda gradient: gradient.clamp(-1, 1))
    return -tokens.advantages * ratio


def coarse(tokens: PolicyTokens) -> Tensor:
    return -tokens.advantages * tokens.log_ratio.float().exp()


def fickle_detach(tokens: PolicyTokens) -> Tensor:
    for x in tokens.logprobs:
        if int(x.item() * 3e6) % 2:
            x.detach()
    return plain(tokens)


def batch_mean(tokens: PolicyTokens) -> Tensor:
    return plain(tokens) - (plain(tokens) * tokens.mask).sum() / max(int(tokens.mask.sum()), 1)


def batch_mean_of_the_gradient(tokens: PolicyTokens) -> Tensor:
    total = tokens.log_ratio.sum()
    return plain(tokens) + total - total.detach()


def batch_maximum(tokens: PolicyTokens) -> Tensor:
    return plain(tokens) / max(tokens.advantages.abs().tolist(), default=1.0)


def in_place(tokens: PolicyTokens) -> Tensor:
    loss = plain(tokens)
    tokens.advantages.mul_(2)
    return loss


def in_place_without_effect(tokens: PolicyTokens) -> Tensor:
    tokens.logprobs.clamp_(max=0)
    return plain(tokens)


def in_place_by_numpy(tokens: PolicyTokens) -> Tensor:
    loss = plain(tokens)
    tokens.entropy.numpy()[:] += 1
    return loss


def offsets_in_place(tokens: PolicyTokens) -> Tensor:
    tokens.offsets.append(99)
    return plain(tokens)


def uncounted(tokens: PolicyTokens) -> Tensor:
    """The mean over a response with the tokens in it that do not count."""
    parts = [slice(a, b) for a, b in zip(tokens.offsets, tokens.offsets[1:])]
    means = [tokens.log_ratio[part].sum() / max(b - a, 1) for part in parts for a, b in [(part.start, part.stop)]]
    return -tokens.advantages * torch.cat([m.expand(p.stop - p.start) for m, p in zip(means, parts)] or [tokens.logprobs]).exp()


def uncounted_gradient(tokens: PolicyTokens) -> Tensor:
    """The value is the same, not so the gradient."""
    here, all_ = tokens.log_ratio, tokens.response_means(tokens.log_ratio)
    shared = torch.cat([here[a:b].sum().expand(b - a) for a, b in zip(tokens.offsets, tokens.offsets[1:])] or [here])
    return -tokens.advantages * (all_ + (here - here.detach()) * shared.detach())


def crashes_on_an_empty_response(tokens: PolicyTokens) -> Tensor:
    best = [tokens.logprobs[a:b].max().expand(b - a) for a, b in zip(tokens.offsets, tokens.offsets[1:])]
    return plain(tokens) + (torch.cat(best) - tokens.logprobs if best else 0.0) * tokens.mask * 0


def crashes_without_responses(tokens: PolicyTokens) -> Tensor:
    return torch.cat([plain(tokens)[a:b] for a, b in zip(tokens.offsets, tokens.offsets[1:])])


def nan_where_nothing_counts(tokens: PolicyTokens) -> Tensor:
    """The mean over a response in which no token counts is 0 / 0; a token beside one that counts is not hit."""
    parts = [(tokens.log_ratio[a:b], tokens.mask[a:b]) for a, b in zip(tokens.offsets, tokens.offsets[1:])]
    means = [(x * m).sum().div(m.sum()).expand(len(x)) for x, m in parts]
    return -tokens.advantages * torch.cat(means or [tokens.logprobs]).exp()


def column(tokens: PolicyTokens) -> Tensor:
    return plain(tokens)[:, None]


def mean(tokens: PolicyTokens) -> Tensor:
    return plain(tokens).mean()


def a_list(tokens: PolicyTokens) -> list:
    return plain(tokens).tolist()


def single(tokens: PolicyTokens) -> Tensor:
    return plain(tokens).float()


def double(tokens: PolicyTokens) -> Tensor:
    return plain(tokens).double()


def short_weight(tokens: PolicyTokens) -> PolicyTerm:
    none = torch.zeros_like(tokens.mask)
    return PolicyTerm(plain(tokens), torch.ones(()), none, none)


def raises(tokens: PolicyTokens) -> Tensor:
    return plain(tokens) * tokens.rewards


def exits(tokens: PolicyTokens) -> Tensor:
    sys.exit(0)


def noisy(tokens: PolicyTokens) -> Tensor:
    return plain(tokens) * random.random()


def nan_without_advantage(tokens: PolicyTokens) -> Tensor:
    return -tokens.advantages / tokens.advantages.abs() * tokens.log_ratio.exp()


def nan_gradient_on_policy(tokens: PolicyTokens) -> Tensor:
    return plain(tokens) + tokens.log_ratio.square().sqrt()


def unbounded(tokens: PolicyTokens) -> Tensor:
    return -tokens.advantages * (tokens.logprobs - tokens.old_logprobs).exp()


def nan_of_certain_tokens(tokens: PolicyTokens) -> Tensor:
    return plain(tokens) + torch.log1p(-torch.where(tokens.mask, tokens.logprobs, -1.0).exp())


def cancels(tokens: PolicyTokens) -> Tensor:
    return -tokens.advantages * ((1e4 + tokens.log_ratio) - 1e4)


@pytest.mark.parametrize(
    ("loss", "failed", "message"),
    [
        (item, {"gradient"}, "autograd gives"),
        (data, {"gradient"}, "Use .detach(), not under no_grad, on what is meant to be constant"),
        (through_numpy, {"gradient"}, "autograd gives"),
        (no_grad, {"gradient"}, "autograd gives"),
        (no_grad_detach, {"gradient"}, "not under no_grad"),
        (new_tensor, {"gradient"}, "autograd gives"),
        (whole_in_numpy, {"gradient"}, "no token has a gradient"),
        (wrong_backward, {"gradient"}, "backward of your own"),
        (hook, {"gradient"}, "finite differences"),
        (coarse, {"gradient"}, "rounded by a cast"),
        (fickle_detach, {"gradient"}, ".detach() was called on other things than before"),
        (batch_mean, {"splitting"}, "when the batch is cut into 6"),
        (batch_mean_of_the_gradient, {"splitting"}, "gives other results with every micro-batch size"),
        (batch_maximum, {"splitting"}, "when the batch is cut into 6"),
        (in_place, {"inputs"}, "tokens.advantages was written to"),
        (in_place_without_effect, {"inputs"}, "tokens.logprobs was written to"),
        (in_place_by_numpy, {"inputs"}, "tokens.entropy was written to"),
        (offsets_in_place, {"inputs"}, "tokens.offsets was written to"),
        (uncounted, {"mask"}, "with other numbers there"),
        (uncounted_gradient, {"mask"}, "gradient"),
        (crashes_on_an_empty_response, {"empty"}, "given responses without tokens, it raised RuntimeError"),
        (crashes_without_responses, {"empty"}, "given no token at all, it raised"),
        (nan_where_nothing_counts, {"empty"}, "0 × nan is nan"),
        (column, {"result"}, "returned a tensor of shape [40, 1]"),
        (mean, {"result"}, "it is the trainer that takes the mean"),
        (a_list, {"result"}, "returned a list"),
        (single, {"result"}, "torch.float64 tokens gave a torch.float32 loss"),
        (double, {"result"}, "torch.float32 tokens gave a torch.float64 loss"),
        (short_weight, {"result"}, "returned a tensor of shape [] as weight, expected a value for each of 40 tokens"),
        (exits, {"result"}, "it raised SystemExit: 0 (test_check_loss.py, line "),
        (raises, {"result"}, "it raised AttributeError: 'PolicyTokens' object has no attribute 'rewards' (test_check_loss.py, line "),
        (noisy, {"result"}, "at the second call"),
        (nan_without_advantage, {"extremes", "empty"}, "without dividing by A"),
        (nan_gradient_on_policy, {"extremes", "empty"}, "(A = 1, r = 1, logprob = -1): the gradient is nan"),
        (unbounded, {"extremes"}, "Take the ratio from tokens.log_ratio"),
        (nan_of_certain_tokens, {"extremes"}, "the loss is -inf"),
        (cancels, {"float32"}, "in float32"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_loss_fails_the_check_that_is_about_it(capsys, loss, failed, message):
    text, seen = report(capsys, loss.__name__)
    assert seen == failed, text
    assert message in text


def test_a_failure_names_the_token_and_both_numbers(capsys):
    """The loss −A·s·r with s the token's own logprob, whose gradient is −A·s·r, and −A·r·(s + 1) if s is not held constant."""
    text, failed = report(capsys, "one_item")
    tokens = ordinary()
    a, s, r = (float(x[7]) for x in (tokens.advantages, tokens.logprobs, tokens.log_ratio.exp()))
    assert failed >= {"gradient"} and "token 0 of response 2 (" in text
    line = next(line for line in text.splitlines() if "autograd gives" in line)
    seen, expected = line.split("autograd gives ")[1].split(", finite differences ")
    assert float(seen) == pytest.approx(-a * s * r, rel=1e-6)
    assert float(expected) == pytest.approx(-a * r * (s + 1), rel=1e-5)


def test_the_batches_cover_what_they_are_for():
    tokens = ordinary()
    ratio, positive = tokens.log_ratio.exp(), tokens.advantages > 0
    for sign in (positive, ~positive):
        assert ratio[sign].min() < 0.2 and ratio[sign].max() > 5 and ((ratio[sign] > 0.8) & (ratio[sign] < 1.2)).any()
        assert tokens.low_entropy[sign].any() and not tokens.low_entropy[sign].all()
    assert tokens.mask.all() and (tokens.logprobs < 0).all() and (tokens.advantages != 0).all()
    far = extreme()
    delta = (far.logprobs - far.old_logprobs)[far.mask]
    for advantage in (1, -1, 0):
        chosen = far.advantages[far.mask] == advantage
        assert delta[chosen].max() > 80 and delta[chosen].min() < -80 and (delta[chosen] == 0).any()
    assert not far.logprobs[~far.mask].any() and not far.advantages[~far.mask].any()


# --- options and the command --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("asp", [], "did you mean aspo?"),
        ("no.such.module:loss", [], "importing no.such.module raised"),
        (f"{__name__}:plain", ["sacle=2.0"], "cannot be called as (tokens, sacle=…)"),
        (f"{__name__}:plain", ["scale"], "not of the form option=value"),
        (f"{__name__}:plain", ["scale=[1"], "not valid YAML"),
        ("aspo", ["scale=2.0"], "needs a policy loss of your own"),
    ],
)
def test_what_cannot_be_tried_is_refused(name, given, message):
    with pytest.raises(UserError) as refused:
        check_loss(name, given)
    assert message in str(refused.value)


def check(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    heavy = "{'ray', 'vllm', 'megatron', 'transformers'} & set(sys.modules)"
    code = f"import sys, atexit; atexit.register(lambda: print('HEAVY', {heavy}, file=sys.stderr))"
    code += "; from megatron_aspo.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "check-loss", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_tries_a_file_in_the_working_directory(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def loss(tokens, *, power=1.0):\n    return -tokens.advantages * tokens.log_ratio.exp() ** power\n\n\n"
        "def bad(tokens):\n    return loss(tokens).mean()\n"
    )
    good = check(tmp_path, "mine:loss", "power=5e-1")
    assert good.returncode == 0 and json.loads(good.stdout.splitlines()[-1])["options"] == {"power": 0.5}
    assert good.stderr == "HEAVY set()\n"
    bad = check(tmp_path, "mine:bad")
    assert bad.returncode == 1 and json.loads(bad.stdout.splitlines()[-1])["passed"] is False
