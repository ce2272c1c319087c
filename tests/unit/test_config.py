"""Recipes and overrides: what is refused, and with which words."""

from pathlib import Path

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.config import Config, load_config, to_yaml

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: some/model\ntask: single_digit_addition\noptimizer:\n  lr: 1e-5\n")
    return path


def test_values_come_from_defaults_recipe_and_overrides_in_that_order(recipe):
    config = load_config(recipe, ["optimizer.weight_decay=0.5", "algorithm.policy_loss=ppo_clip", "deterministic=true", "steps=7"])
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.clip_grad) == (1e-5, 0.5, 1.0)
    assert (config.algorithm.policy_loss, config.deterministic, config.steps) == ("ppo_clip", True, 7)


@pytest.mark.parametrize("loss", ["gspo", "cispo"])
def test_a_preset_does_not_give_a_loss_the_bounds_of_another(recipe, loss):
    with pytest.raises(UserError, match=f"preset=archer_reference fixes ε by entropy class, which policy_loss={loss} does not know"):
        load_config(recipe, ["preset=archer_reference", f"algorithm.policy_loss={loss}"])
    assert load_config(recipe, ["preset=archer_reference", "algorithm.policy_loss=archer"]).algorithm.policy_loss_options["clip_low"] == 0.2


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (
            [],
            ["algorithm.policy_loss=gspo"],
            "algorithm.policy_loss=gspo takes the place of aspo, but the recipe sets algorithm.aggregation=",
        ),
        (["algorithm.policy_loss=gspo"], ["algorithm.policy_loss=aspo"], "algorithm.aggregation=seq_mean_token_mean, which goes with gspo"),
        (["preset=archer_reference"], ["preset=paper"], "preset=paper takes the place of archer_reference"),
    ],
)
def test_a_resolved_recipe_does_not_carry_the_values_of_one_loss_over_to_another(recipe, tmp_path, first, then, message):
    (tmp_path / "again.yaml").write_text(to_yaml(load_config(recipe, first)))
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "again.yaml", then)
    assert message in str(caught.value) and str(caught.value).endswith("set it too, or remove it from the recipe")


def test_a_loss_may_be_changed_with_the_values_that_go_with_it(recipe, tmp_path):
    (tmp_path / "again.yaml").write_text(to_yaml(load_config(recipe)))
    bounds = ["algorithm.clip_low=3e-4", "algorithm.clip_high=4e-4", "algorithm.aggregation=seq_mean_token_mean"]
    assert load_config(tmp_path / "again.yaml", ["algorithm.policy_loss=gspo", *bounds]).algorithm.policy_loss_options["clip_low"] == 3e-4
    assert load_config(tmp_path / "again.yaml", ["algorithm.policy_loss=ppo_clip"]).algorithm.policy_loss_options["clip_low"] == 0.2
    assert load_config(tmp_path / "again.yaml", ["algorithm.policy_loss=aspo"]).algorithm.policy_loss_options["clip_low"] == 0.2


def test_a_preset_among_the_overrides_replaces_what_the_recipe_writes_and_reports_it(recipe, capsys):
    recipe.write_text(recipe.read_text() + "algorithm: {aggregation: token_mean, clip_low: 0.2, group_filter: drop}\n")
    config = load_config(recipe, ["preset=archer_reference"])
    assert (config.algorithm.aggregation, config.algorithm.group_filter) == ("seq_mean_token_mean", "drop_zero_or_one")
    replaced = "preset=archer_reference replaces the recipe's algorithm.aggregation=token_mean, algorithm.group_filter=drop"
    assert capsys.readouterr().err == f"megatron-aspo: {replaced}\n"

    resolved = recipe.with_name("resolved.yaml")
    resolved.write_text(to_yaml(load_config(recipe)))
    assert load_config(resolved, ["preset=archer_reference"]) == config


def test_a_preset_does_not_replace_an_override_nor_what_its_own_recipe_writes(recipe):
    text = recipe.read_text() + "algorithm: {aggregation: token_mean}\n"
    recipe.write_text(text)
    refused = "preset=archer_reference fixes algorithm.aggregation=seq_mean_token_mean, not token_mean"
    with pytest.raises(UserError, match=refused):
        load_config(recipe, ["preset=archer_reference", "algorithm.aggregation=token_mean"])
    recipe.write_text(text + "preset: archer_reference\n")
    for overrides in ([], ["preset=archer_reference"]):
        with pytest.raises(UserError, match=refused):
            load_config(recipe, overrides)


def test_options_of_a_loss_of_ones_own_may_be_numbers_with_an_exponent(recipe):
    given = "{a: 1e-3, b: -2.5E2, c: 3, d: e3, e: 1e, f: .5e1}"
    config = load_config(recipe, ["algorithm.policy_loss=m:f", f"algorithm.policy_loss_options={given}"])
    assert config.algorithm.policy_loss_options == {"a": 1e-3, "b": -250.0, "c": 3, "d": "e3", "e": "1e", "f": 5.0}


def test_the_resolved_configuration_reads_back_as_the_same(recipe, tmp_path):
    config = load_config(recipe, ["optimizer.lr=1e-6", "rollout.temperature=1"])
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.polcy_loss=aspo", "unknown key algorithm.polcy_loss; did you mean algorithm.policy_loss?"),
        ("modell=x", "unknown key modell; did you mean model?"),
        ("algorithm.policy_loss=asbo", "did you mean aspo?"),
        ("algorithm.policy_loss=", "algorithm.policy_loss= is not known; valid: archer, aspo, cispo"),
        ("trainer=3", "trainer is a section of keys, not the value 3"),
        ("model.path=x", "model is not a section of keys"),
        ("optimizer.lr=fast", "optimizer.lr='fast' is not a finite number"),
        ("optimizer.lr=.inf", "optimizer.lr=inf is not a finite number"),
        ("steps=1.5", "steps=1.5 is not a whole number"),
        ("steps=true", "steps=True is not a whole number"),
        ("steps=0", "steps=0 must be greater than 0"),
        ("transfer_verify_every=-1", "transfer_verify_every=-1 must not be negative"),
        ("placement=collocated", "placement=collocated is not known; did you mean colocated?"),
        ("rollout.sleep_level=3", "rollout.sleep_level=3 is not known; it is 1 or 2"),
        ("rollout.sleep_level=1", "rollout.sleep_level=1 has no effect with placement=split"),
        ("rollout.engines=-1", "rollout.engines=-1 must be greater than 0"),
        ("data.reward_timeout_s=0", "data.reward_timeout_s=0.0 must be greater than 0"),
        ("data.reward_failure_score=.nan", "data.reward_failure_score=nan is not a finite number"),
        ("algorithm.kl_coef=-0.1", "algorithm.kl_coef=-0.1 must not be negative"),
        ("algorithm.clip_low=1.5", "algorithm.clip_low=1.5 must be at most 1"),
        ("algorithm.policy_loss_options=3", "algorithm.policy_loss_options=3 is not a mapping of names to values"),
        ("optimizer={warmup_from_zero: true, warmup_steps: 0}", "optimizer.warmup_from_zero=true has no effect"),
        ("algorithm.policy_loss_options={1: 2}", "algorithm.policy_loss_options={1: 2} has a name that is not text"),
        ("optimizer={decay_one_dimensional: true, weight_decay: 0}", "optimizer.decay_one_dimensional=true has no effect"),
        (
            "algorithm={aggregation: seq_mean_token_sum, sequence_count: full_mini_batch, mini_batch_prompts: 65}",
            "algorithm.mini_batch_prompts=65 is more than rollout.prompts_per_step=64",
        ),
        ("preset=papper", "preset=papper is not known; did you mean paper?"),
        ("algorithm.low_entropy_quantile=80", "must be in [0, 1]"),
        ("optimizer.beta2=1", "optimizer.beta2=1.0 must be in [0, 1)"),
        ("rollout.responses_per_prompt=1", "take at least 2"),
        ("rollout.temperature=0.001", "rollout.temperature=0.001 must be at least 0.01"),
        ("evaluation.temperature=0.005", "evaluation.temperature=0.005 must be 0 (greedy) or at least 0.01"),
        ("name=2026-13-45", "not valid YAML"),
        ("trainer.distributed_optimizer=true", "set trainer.data_parallel above 1"),
        ("trainer.sequence_parallel=true", "set trainer.tensor_parallel above 1 or leave it false"),
        ("trainer.virtual_pipeline=2", "interleaves pipeline stages, of which there is one; set it to 1"),
        ("trainer.virtual_pipeline=0", "trainer.virtual_pipeline=0 must be greater than 0"),
        ("trainer.context_parallel=0", "trainer.context_parallel=0 must be greater than 0"),
        ("trainer.expert_parallel=0", "trainer.expert_parallel=0 must be greater than 0"),
        ("trainer.expert_tensor_parallel=-1", "trainer.expert_tensor_parallel=-1 must not be negative"),
        ("trainer.dtype=float64", "trainer.dtype=float64 is not known"),
        ("deterministic=maybe", "deterministic='maybe' is not true or false"),
        ("evaluation={draws: 0, every: 2}", "evaluation.draws=0 draws nothing"),
        ("checkpoint.every=-1", "checkpoint.every=-1 must not be negative"),
        ("checkpoint.keep_last=1", "checkpoint.keep_last=1 has no effect with checkpoint.every=0"),
        ("checkpoint.asynchronous=false", "checkpoint.asynchronous=False has no effect with checkpoint.every=0"),
        ("checkpoint={every: 2, keep_last: 0, keep_every: 4}", "checkpoint.keep_every=4 has no effect with checkpoint.keep_last=0"),
        ("checkpoint={every: 2, keep_every: 3}", "checkpoint.keep_every=3 is not a multiple of checkpoint.every=2"),
        ("checkpoint={every: 2, keep_best: 1}", "checkpoint.keep_best=1 needs an accuracy at each checkpoint"),
        ("resume=", "resume is empty; set never, auto"),
        ("model=", "model is empty"),
        ("steps", "not of the form key.path=value"),
        ("=3", "not of the form key.path=value"),
        ("steps=[", "not valid YAML"),
    ],
)
def test_mistakes_are_refused_with_the_key_and_the_cure(recipe, override, message):
    with pytest.raises(UserError) as caught:
        load_config(recipe, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_checkpoints_may_be_kept_by_accuracy_where_each_has_one(recipe):
    words = ["checkpoint={every: 4, keep_best: 2, keep_every: 8}", "evaluation={draws: 4, every: 2}"]
    assert load_config(recipe, words).checkpoint.keep_best == 2


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [1", "\tx: 1"])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match="recipe"):
        load_config(tmp_path / "bad.yaml")


def test_a_missing_or_binary_recipe_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no recipe"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "binary.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_of_the_examples_is_valid(path):
    assert load_config(path).name == path.stem


def test_the_default_run_directory_is_named_after_the_run():
    assert Config(name="abc").directory == Path("runs/abc").absolute()
    assert Config(name="abc", run_dir="/elsewhere/x").directory == Path("/elsewhere/x")


def test_options_of_the_code_reward_are_checked_and_have_no_effect_elsewhere(recipe):
    code = ["task=dataset", "data.path=x.jsonl", "data.reward=code"]
    assert load_config(recipe, [*code, "data.code.sandbox.modules=[numpy]"]).data.code.sandbox.modules == ["numpy"]
    for overrides, message in (
        (["data.code.max_tests=3"], r"data\.code\.max_tests has no effect with data\.reward=empty; set data\.reward=code"),
        ([*code, "data.code.total_s=60"], r"data\.reward_timeout_s=60 must be above data\.code\.total_s=60"),
        ([*code, "data.code.limits.memory_mb=0"], r"data\.code\.limits\.memory_mb=0 must be greater than 0"),
        ([*code, "data.code.sandbox.modules=[1]"], r"data\.code\.sandbox\.modules=\[1\] is not a list of texts"),
        ([*code, "data.code.limits.memory=1"], r"unknown key data\.code\.limits\.memory; did you mean data\.code\.limits\.memory_mb"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(recipe, overrides)
