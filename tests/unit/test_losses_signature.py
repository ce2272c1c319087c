"""Options and declarations of policy losses: read from the source without importing it, and written in a recipe in either of two places."""

import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import yaml

from megatron_aspo.common.errors import UserError
from megatron_aspo.config import Config, load_config, to_yaml
from megatron_aspo.losses import registry
from megatron_aspo.losses.declaration import CUSTOM, OPTION_TYPES, Cap, Declaration, declares
from megatron_aspo.losses.find import find_policy_loss
from megatron_aspo.losses.objective import Objective
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.section import FIELDS, algorithm_options
from megatron_aspo.losses.signature import REQUIRED, LossOption, read_signature
from tests.unit import loss_cases as cases
from tests.unit.test_packaging import ROOT, load_tool

LOSS = '''
from megatron_aspo.losses.declaration import {imports}


{decorators}
def mine(tokens, plain=1, *, clip_low: LowerClip = 0.1, cap: Cap, mode="soft"):
    """What it does.

    More of it.

    Args:
        plain: A number.
        clip_low: An ε
            in two lines.
    """
    return tokens.logprobs
'''


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a module `name`.py into the working directory; returns the path of its function `mine`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(name: str, text: str = LOSS, decorators: str = "", imports: str = "Cap, LowerClip, declares") -> str:
        (tmp_path / f"{name}.py").write_text(text.replace("{imports}", imports).replace("{decorators}", decorators))
        importlib.invalidate_caches()
        return f"{name}:mine"

    return write


@pytest.fixture
def load(tmp_path: Path):
    def load(*overrides: str, **algorithm) -> Config:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({"model": "m", "task": "largest_of_three", "algorithm": algorithm}))
        return load_config(recipe, overrides)

    return load


def refusal(function, *arguments, **given) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments, **given)
    return str(error.value)


# --- built-in losses ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", registry.POLICY_LOSSES)
def test_the_source_of_a_built_in_loss_tells_what_its_function_does(loss):
    module, _, name = registry.POLICY_LOSSES[loss].partition(":")
    function = getattr(importlib.import_module(module), name)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    found = registry.signature(loss)
    assert {p.name: p.default for p in parameters} == {name: option.default for name, option in found.options.items()}
    for parameter in parameters:
        assert parameter.kind is parameter.KEYWORD_ONLY and type(parameter.default) in (int, float, bool, str)
        option = found.options[parameter.name]
        assert OPTION_TYPES.get(option.annotation, parameter.annotation) is parameter.annotation
        assert get_args(parameter.annotation)[:1] in ((), (type(parameter.default),))
        assert option.meaning.endswith(".") and parameter.name not in FIELDS
    assert getattr(function, "declaration", Declaration()) == registry.declaration(loss)
    assert found.documentation and "Args:" not in found.documentation and found.documentation in inspect.getdoc(function)


@pytest.mark.parametrize("loss", registry.POLICY_LOSSES)
def test_a_built_in_loss_declares_the_entropy_classes_if_and_only_if_it_reads_them(loss):
    responses = [cases.random_response(np.random.default_rng(i), np.ones(40, bool)) for i in range(3)]
    terms = [cases.policy_loss(loss)(cases.policy_tokens(responses, [low] * 120)).loss for low in (True, False)]
    assert (not torch.equal(*terms)) == registry.declaration(loss).entropy_classes


@pytest.mark.parametrize("loss", registry.POLICY_LOSSES)
def test_a_built_in_loss_declares_a_ratio_if_and_only_if_it_reads_the_old_policy(loss):
    responses = [cases.random_response(np.random.default_rng(i), np.ones(40, bool)) for i in range(3)]
    tokens = cases.policy_tokens(responses, [True] * 120)
    other = tokens.__class__(**vars(tokens) | {"old_logprobs": tokens.old_logprobs - 0.7})
    terms = [cases.policy_loss(loss)(given).loss for given in (tokens, other)]
    gradients = [torch.autograd.grad(term.sum(), tokens.logprobs)[0] for term in terms]
    assert (torch.equal(*terms) and torch.equal(*gradients)) != registry.declaration(loss).ratio


def test_what_the_built_in_losses_declare():
    assert {loss: registry.declaration(loss) for loss in registry.POLICY_LOSSES if registry.declaration(loss) != Declaration()} == {
        "aspo": Declaration(entropy_classes=True),
        "archer": Declaration(entropy_classes=True, kl_by_entropy_class=True),
        "gspo": Declaration(aggregation="seq_mean_token_mean"),
        "reinforce": Declaration(ratio=False),
    }
    assert Declaration().kl_by_entropy_class is False and Declaration().entropy_classes is False
    with pytest.raises(dataclasses.FrozenInstanceError):
        Declaration().ratio = False
    assert Declaration().aggregation == AlgorithmOptions().aggregation == "token_mean"
    assert registry.signature("asbo") is None and registry.own_defaults("asbo") == {}


def test_an_option_without_bounds_has_the_type_of_its_default():
    assert registry.option_type(LossOption(8, "", "")) is int
    assert registry.option_type(LossOption(8, "Cap", "")) == Cap


@pytest.mark.parametrize(
    ("loss", "scope", "needed"),
    [("archer", "mini_batch", True), ("archer", "response", False), ("ppo_clip", "mini_batch", False), ("ppo_clip", "response", False)],
)
def test_only_entropy_classes_of_the_mini_batch_need_its_threshold(loss, scope, needed):
    assert Objective(AlgorithmOptions(policy_loss=loss, entropy_quantile_scope=scope)).needs_entropy_threshold is needed


def test_the_pages_are_what_the_signatures_say():
    tool = load_tool("make_losses_doc")
    current = tool.PAGE.read_text()
    assert tool.page(current) == current, "run .venv/bin/python tools/maintain/make_losses_doc.py"
    for loss in registry.POLICY_LOSSES:
        assert f"### `{loss}`\n" in current and f"(figures/losses/{loss}.svg)" in current
    assert (
        "| `algorithm.clip_low` | `0.2`, `0.0003` (`gspo`), `1.0` (`cispo`) | `aspo`, `archer`: lower ε of low-entropy tokens; `ppo_clip`, "
        "`no_is`: lower ε; `gspo`: lower ε, on s; `cispo`: lower ε; 1 means no lower bound. At least\u00a00 and at most\u00a01. |"
    ) in (ROOT / "docs" / "configuration.md").read_text().splitlines()
    assert registry.option_meaning("high_entropy_clip_low") == "`aspo`, `archer`: lower ε of high-entropy tokens."
    assert registry.option_meaning("clip_high") == (
        "`aspo`, `archer`: upper ε of low-entropy tokens; `ppo_clip`, `cispo`, `no_is`: upper ε; `gspo`: upper ε, on s."
    )
    schema = json.loads((ROOT / "docs" / "recipe.schema.json").read_text())["properties"]["algorithm"]["properties"]
    assert {"type": "number", "exclusiveMinimum": 1}.items() <= schema["dual_clip_pos"].items()


# --- custom losses ------------------------------------------------------------------------------------------------------------------------


def test_a_custom_loss_is_read_from_its_source_and_not_imported(write):
    path = write("read_me", "raise RuntimeError('imported')\n" + LOSS, '@declares(entropy_classes=False, aggregation="seq_mean_token_sum")')
    found = read_signature(path)
    assert {name: (o.default, o.annotation, o.meaning) for name, o in found.options.items()} == {
        "plain": (1, "", "A number."),
        "clip_low": (0.1, "LowerClip", "An ε in two lines."),
        "cap": (REQUIRED, "Cap", ""),
        "mode": ("soft", "", ""),
    }
    assert found.documentation == "What it does.\n\nMore of it."
    assert registry.declaration(path) == Declaration(aggregation="seq_mean_token_sum")
    assert "read_me" not in sys.modules


@pytest.mark.parametrize(
    "text",
    [
        "def other(tokens): pass",
        "def mine(tokens, a=len('x')): pass",
        "def mine(tokens, **options): pass",
        "def mine(*tokens): pass",
        "def mine(): pass",
        "import functools\n\n@functools.cache\ndef mine(tokens): pass",
        "@declares(**{})\ndef mine(tokens): pass",
        "if True:\n    def mine(tokens): pass",
        "def mine(tokens:",
    ],
)
def test_a_source_that_does_not_tell_leaves_the_options_to_the_function(write, text):
    path = write("silent", text)
    assert registry.signature(path) is None and registry.declaration(path) == CUSTOM and registry.own_defaults(path) == {}
    assert algorithm_options(policy_loss=path, policy_loss_options={"a": 1}).policy_loss_options == {"a": 1}


def test_a_loss_of_no_file_and_one_that_changes_are_read_anew(write):
    assert registry.signature("no_such_package.at_all:mine") is None
    assert list(read_signature(write("changing", "def mine(tokens, a=1): pass")).options) == ["a"]
    assert list(read_signature(write("changing", "def mine(tokens, bc=1): pass\n\n\ndef mine(tokens, d=1): pass")).options) == ["d"]


def test_what_a_custom_loss_declares_must_be_readable(write):
    hidden = "from megatron_aspo.losses.declaration import declares\nif True:\n    @declares(ratio=False)\n    def mine(tokens): pass\n"
    assert refusal(find_policy_loss, AlgorithmOptions(policy_loss=write("hidden", hidden))) == (
        "algorithm.policy_loss=hidden:mine: what the function declares cannot be read from its source; define it by a plain def at the top "
        "of the module that the path names, with no decorator but declares(…) and literal arguments"
    )
    shown = write("shown", decorators="@declares(ratio=False)")
    assert find_policy_loss(AlgorithmOptions(policy_loss=shown, policy_loss_options={"cap": 2.0}))


def test_declares_returns_the_function_itself():
    def function(tokens):
        return tokens

    assert declares(entropy_classes=True)(function) is function and function.declaration == Declaration(entropy_classes=True)


# --- in a recipe --------------------------------------------------------------------------------------------------------------------------


def test_an_option_of_the_loss_is_a_key_of_the_section_or_of_policy_loss_options(load):
    want = {"clip_low": 0.1, "clip_high": 0.2, "dual_clip_neg": 3.0}
    for algorithm, overrides in (
        ({"clip_low": 0.1}, []),
        ({"policy_loss_options": {"clip_low": 0.1}}, []),
        ({}, ["algorithm.clip_low=0.1"]),
        ({}, ["algorithm.policy_loss_options.clip_low=1e-1"]),
        ({"clip_low": 0.3}, ["algorithm.policy_loss_options={clip_low: 0.1}"]),
        ({"policy_loss_options": {"clip_low": 0.3}}, ["algorithm.clip_low=0.1"]),
    ):
        assert load(*overrides, policy_loss="ppo_clip", **algorithm).algorithm.policy_loss_options == want, (algorithm, overrides)
    assert refusal(load, clip_low=0.1, policy_loss_options={"clip_low": 0.1}) == (
        "algorithm.clip_low and algorithm.policy_loss_options.clip_low are one option and both are set; remove one of them"
    )


def test_a_resolved_recipe_holds_every_option_of_its_loss_and_replays(load, tmp_path):
    for loss, options in (("gspo", {"clip_low": 3e-4, "clip_high": 0.01}), ("reinforce", {})):
        config = load(*(f"algorithm.{name}={value}" for name, value in options.items()), policy_loss=loss)
        assert config.algorithm.policy_loss_options == options
        (tmp_path / "again.yaml").write_text(to_yaml(config))
        assert load_config(tmp_path / "again.yaml") == config


def test_a_recipe_with_another_loss_may_hold_its_options_at_their_defaults(load, tmp_path):
    """As does the resolved recipe of a run, in this form and in that of earlier versions, whose options all stood in the section."""
    assert algorithm_options(policy_loss="gspo", dual_clip_pos=3.0, clip_high=0.5) == AlgorithmOptions(
        policy_loss="gspo", policy_loss_options={"clip_low": 3e-4, "clip_high": 0.5}, aggregation="seq_mean_token_mean"
    )
    every = dict(cases.COMMON) | {"policy_loss": "aspo"}
    assert load("algorithm.policy_loss=reinforce", **every).algorithm.policy_loss_options == {}
    (tmp_path / "again.yaml").write_text(to_yaml(load()))
    assert load_config(tmp_path / "again.yaml", ["algorithm.policy_loss=no_is"]).algorithm.policy_loss_options == {
        "clip_low": 0.2,
        "clip_high": 0.2,
    }
    assert refusal(load, "algorithm.policy_loss=no_is", **every | {"dual_clip_neg": 2.0}) == (
        "algorithm.dual_clip_neg=2.0 has no effect: it needs policy_loss aspo or ppo_clip or archer, not no_is; remove it"
    )


def test_options_are_typed_and_bounded_by_the_signature(load, write):
    assert refusal(load, clip_low="much") == "algorithm.clip_low='much' is not a finite number"
    assert refusal(load, clip_low=True) == "algorithm.clip_low=True is not a finite number"
    assert refusal(load, clip_high=float("inf")) == "algorithm.clip_high=inf is not a finite number"
    assert refusal(load, policy_loss_options={"clip_low": 1.5}) == "algorithm.clip_low=1.5 must be at most 1: a ratio is positive"
    assert refusal(load, policy_loss_options={"clip_lo": 1.5, "clip_low": 0.1}) == (
        "algorithm.policy_loss_options={'clip_lo': 1.5} has no effect: it needs a policy loss of your own; remove it"
    )
    assert refusal(load, clip_lo=0.1) == "unknown key algorithm.clip_lo; did you mean algorithm.clip_low?"
    path = write("bounded")
    assert refusal(load, policy_loss=path, cap=1.0) == "algorithm.cap=1.0 must be greater than 1, the weight on policy"
    assert refusal(load, policy_loss=path, policy_loss_options={"cap": "x"}) == "algorithm.cap='x' is not a finite number"


def test_an_option_of_a_custom_loss_may_be_a_key_of_the_section(load, write):
    path = write("sectioned")
    assert load(policy_loss=path, cap=2.0, mode="hard").algorithm.policy_loss_options == {"clip_low": 0.1, "cap": 2.0, "mode": "hard"}
    assert refusal(load, policy_loss=path, dual_clip_pos=2.0) == (
        f"algorithm.dual_clip_pos=2.0 has no effect: it needs policy_loss aspo, not {path}; remove it"
    )
    assert refusal(load, policy_loss=path, mdoe=2.0) == "unknown key algorithm.mdoe; did you mean algorithm.mode?"
    # Nothing is known of this one: what is no built-in default is handed to the function.
    unknown = load(policy_loss="no_such_module:f", clip_low=0.3, dual_clip_pos=3.0).algorithm
    assert unknown.policy_loss_options == {"clip_low": 0.3}


def test_the_declared_aggregation_is_the_default_and_yields_to_the_recipe(load, write):
    path = write("summing", decorators='@declares(aggregation="seq_mean_token_sum")')
    assert load(policy_loss=path).algorithm.aggregation == "seq_mean_token_sum"
    assert load(policy_loss=path, aggregation="token_mean").algorithm.aggregation == "token_mean"
    assert refusal(load, policy_loss=path, low_entropy_quantile=0.5).startswith("algorithm.low_entropy_quantile=0.5 has no effect")


def test_the_signatures_are_read_without_importing_torch():
    code = "import sys; from megatron_aspo.losses import section; section.algorithm_options(clip_low=0.1); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
