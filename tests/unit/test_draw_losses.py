"""The pictures of docs/losses.md: their curves are the published formulas, and the files are those that the script draws."""

from dataclasses import fields

import numpy as np
import pytest

from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.registry import POLICY_LOSSES, builtin_options
from megatron_aspo.losses.section import algorithm_options
from tests.reference.losses import POLICY
from tests.unit import loss_cases as cases
from tests.unit.test_packaging import ROOT, load_tool

TOOL = load_tool("draw_losses")


def between(r, low, high):
    return (r >= low) & (r <= high)


def sigmoid_gate(r, tau):
    """Return r·f′(r) for f(r) = σ(τ(r − 1))·4/τ."""
    p = 1 / (1 + np.exp(-tau * (r - 1)))
    return 4 * r * p * (1 - p)


# (loss, sign of A, low entropy) → weight at r, written from the papers with their constants.
FORMULAS = {
    ("aspo", 1, True): lambda r: np.minimum(1 / r, 3) * (r <= 1.2),
    ("aspo", 1, False): lambda r: np.minimum(1 / r, 3) * (r <= 1.4),
    ("aspo", -1, True): lambda r: np.minimum(r, 3) * (r >= 0.8),
    ("aspo", -1, False): lambda r: np.minimum(r, 3) * (r >= 0.6),
    ("ppo_clip", 1, True): lambda r: r * (r <= 1.2),
    ("ppo_clip", -1, True): lambda r: r * between(r, 0.8, 3),
    ("archer", 1, True): lambda r: r * (r <= 1.2),
    ("archer", 1, False): lambda r: r * (r <= 1.4),
    ("archer", -1, True): lambda r: r * between(r, 0.8, 3),
    ("archer", -1, False): lambda r: r * between(r, 0.6, 3),
    ("gspo", 1, True): lambda s: s * (s <= 1 + 4e-4),
    ("gspo", -1, True): lambda s: s * (s >= 1 - 3e-4),
    ("cispo", 1, True): lambda r: np.minimum(r, 1.2),
    ("cispo", -1, True): lambda r: np.minimum(r, 1.2),
    ("reinforce", 1, True): lambda r: np.ones_like(r),
    ("reinforce", -1, True): lambda r: np.ones_like(r),
    ("no_is", 1, True): lambda r: 1.0 * (r <= 1.2),
    ("no_is", -1, True): lambda r: 1.0 * (r >= 0.8),
    ("examples.losses.sapo:sapo", 1, True): lambda r: sigmoid_gate(r, 1.0),
    ("examples.losses.sapo:sapo", -1, True): lambda r: sigmoid_gate(r, 1.05),
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("case", FORMULAS, ids=lambda case: f"{case[0].rpartition(':')[2]}-{case[1]}-{case[2]}")
def test_a_curve_is_the_published_weight(case):
    r, weight = TOOL.curve(*case)
    assert np.all(np.diff(r) > 0) and len(r) > 100
    assert (r[0], r[-1]) == pytest.approx((0.999, 1.001) if case[0] == "gspo" else (0.1, 10))
    assert np.allclose(weight, FORMULAS[case](r), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_every_curve_of_a_built_in_loss_is_the_reference(name):
    for sign, low in ((1, True), (1, False), (-1, True), (-1, False)):
        r, weight = TOOL.curve(name, sign, low)
        options = cases.by_name(algorithm_options(policy_loss=name))
        old, classes = np.full(1, -3.0), np.full(1, low)
        gradients = [POLICY[name](old + np.log(ratio), old, float(sign), classes, options).gradient[0] for ratio in r]
        assert np.allclose(weight, -np.array(gradients) / sign, rtol=1e-9, atol=1e-12)


def test_every_formula_is_of_a_loss_that_is_drawn_and_a_jump_is_drawn_upright():
    assert {name for name, *_ in FORMULAS} <= set(TOOL.DRAWN) == {*POLICY_LOSSES, "examples.losses.sapo:sapo"}
    for name, sign, low_entropy in FORMULAS:
        r, weight = TOOL.curve(name, sign, low_entropy)
        for left, right in zip(np.flatnonzero(np.abs(np.diff(weight)) > 0.3), np.flatnonzero(np.abs(np.diff(weight)) > 0.3) + 1):
            assert r[right] / r[left] < 1 + 1e-8


def test_the_marks_are_where_the_weight_breaks():
    assert TOOL.marks("aspo", 1, True) == pytest.approx({"1 + ε": 1.2, "1/c": 1 / 3})
    assert TOOL.marks("aspo", -1, False) == pytest.approx({"1 − ε": 0.6, "c": 3.0})
    assert TOOL.marks("gspo", -1, True) == pytest.approx({"1 − ε": 0.9997})
    assert TOOL.marks("cispo", -1, True) == pytest.approx({"1 + ε": 1.2})
    assert TOOL.marks("reinforce", 1, True) == {}


def test_the_pictures_of_the_docs_are_current(tmp_path, capsys):
    TOOL.main(["--out", str(tmp_path)])
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_bytes() for path in TOOL.OUT.glob("*.svg")}
    assert set(drawn) == set(kept)
    changed = [name for name in drawn if drawn[name] != kept[name]]
    assert not changed, "run .venv/bin/python tools/plot/draw_losses.py"
    page = (ROOT / "docs" / "losses.md").read_text()
    assert [name for name in kept if f"(figures/losses/{name})" not in page] == []


def test_a_custom_loss_can_be_drawn(tmp_path, capsys, monkeypatch):
    (tmp_path / "own_to_draw.py").write_text("def halved(tokens):\n    return -tokens.advantages * tokens.logprobs / 2\n")
    monkeypatch.chdir(tmp_path)
    TOOL.main(["own_to_draw:halved", "--out", "pictures"])
    assert (tmp_path / "pictures" / "halved.svg").read_text().startswith("<?xml")
    assert np.allclose(TOOL.curve("own_to_draw:halved", -1)[1], 0.5)


def test_the_page_names_every_option_of_the_algorithm():
    page = (ROOT / "docs" / "losses.md").read_text()
    names = [*(f.name for f in fields(AlgorithmOptions)), *builtin_options()]
    assert [name for name in names if f"`{name}" not in page] == []
