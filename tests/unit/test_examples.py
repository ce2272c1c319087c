"""The policy loss in examples/: right against its paper's formula, and sound by check-loss."""

import json

import numpy as np
import pytest
import torch

from examples.losses.sapo import sapo
from megatron_aspo.losses.find import find_policy_loss
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.policy import PolicyTokens
from megatron_aspo.losses.tester import check_loss
from tests.unit.test_packaging import ROOT

NAME = "examples.losses.sapo:sapo"


def tokens(logprobs: np.ndarray, old: np.ndarray, advantages: np.ndarray) -> PolicyTokens:
    n = len(old)
    flags = torch.ones(n, dtype=torch.bool)
    given = [torch.from_numpy(x) for x in (logprobs, old, advantages)]
    return PolicyTokens(given[0].requires_grad_(), *given[1:], torch.ones(n, dtype=torch.float64), flags, flags, [0, n])


@pytest.mark.parametrize("taus", [{}, {"tau_pos": 2.0, "tau_neg": 0.3}])
def test_sapo_is_the_papers_formula_with_its_derivative(monkeypatch, taus):
    monkeypatch.chdir(ROOT)
    random = np.random.default_rng(3)
    old, advantages = random.uniform(-5, -2, 300), random.normal(0, 1, 300)
    advantages[:20] = 0
    logprobs = old + random.normal(0, 0.7, 300)
    r = np.exp(logprobs - old)
    tau = np.where(advantages > 0, taus.get("tau_pos", 1.0), taus.get("tau_neg", 1.05))
    gate = 1 / (1 + np.exp(-tau * (r - 1)))

    options = AlgorithmOptions(policy_loss=NAME, policy_loss_options=taus)
    given = tokens(logprobs, old, advantages)
    term = find_policy_loss(options)(given)
    assert np.allclose(term.loss.detach().numpy(), -advantages * gate * 4 / tau, rtol=1e-12, atol=0)
    term.loss.sum().backward()
    # d/dlogp of f(r) = 4/τ·σ is 4/τ·σ(1 − σ)·τ·r.
    weight = 4 * gate * (1 - gate) * r
    assert np.allclose(given.logprobs.grad.numpy(), -advantages * weight, rtol=1e-11, atol=1e-15)
    signed = advantages != 0
    assert np.allclose(term.weight.numpy()[signed], weight[signed], rtol=1e-11)


def test_sapo_weighs_tokens_on_policy_by_one_and_lets_the_far_ones_fade():
    r = np.array([1.0, 8.0, 1e-3])
    given = tokens(np.log(r) - 3, np.full(3, -3.0), np.ones(3))
    sapo(given).sum().backward()
    weight = -given.logprobs.grad.numpy()
    assert weight[0] == pytest.approx(1, rel=1e-12) and weight[1] < 0.04 and weight[2] < 1e-3


@pytest.mark.parametrize("given", [[], ["tau_pos=0.5", "tau_neg=2"]])
def test_sapo_passes_every_check(monkeypatch, capsys, given):
    monkeypatch.chdir(ROOT)
    assert check_loss(NAME, given)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["passed"] and all(last["checks"].values()) and len(last["options"]) == len(given)


def test_the_manual_shows_what_check_loss_says_of_the_example(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    check_loss(NAME)
    printed = capsys.readouterr().out.splitlines()
    shown = (ROOT / "docs" / "losses.md").read_text().split(f"megatron-aspo check-loss {NAME}\n")[1].split("```")[2].splitlines()[1:]
    # The page wraps long lines.
    assert " ".join(shown[:-1]).split() == " ".join(printed[:-1]).split() and printed[-1].startswith(shown[-1].split("…")[0])


def test_the_readme_quotes_the_example():
    section = (ROOT / "README.md").read_text().split("## Your own loss")[1].split("\n## ")[0]
    code = [line.partition("  #")[0].rstrip() for line in (ROOT / "examples/losses/sapo.py").read_text().splitlines()]
    quoted = section.split("```python\n")[1].split("```")[0].splitlines()
    assert set(quoted) <= set(code)
