"""Tasks of reasoning-gym: questions, parameters, held-out questions, scores."""

import ast
import importlib
import importlib.util
import inspect
import textwrap

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.encoder import PromptEncoder
from megatron_aspo.tasks import reasoning_gym
from megatron_aspo.tasks.options import DataOptions
from megatron_aspo.tasks.reasoning_gym import EVALUATING
from megatron_aspo.tasks.task import build_reward, build_task
from tests.tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
TASKS = {
    "leg_counting": {"max_animals": 4},
    "gcd": {"max_value": 500},
    "chain_sum": {"min_terms": 2, "max_terms": 3},
    "basic_arithmetic": {"max_terms": 3},
    "word_sorting": {"max_words": 5},
    "number_sorting": {},
    "spell_backward": {"max_word_len": 6},
    "letter_counting": {},
}


def build(name, seed=0, **options):
    options = DataOptions(**{"max_prompt_tokens": 4000, **options})
    return build_task(f"reasoning_gym:{name}", options, PromptEncoder(TOKENIZER, len(TOKENIZER), options), seed)


@pytest.mark.parametrize("name", TASKS)
def test_the_right_answer_scores_1_and_a_wrong_one_less(name):
    options = {"task_options": TASKS[name]}
    task, reward = build(name, **options), build_reward(f"reasoning_gym:{name}", DataOptions(**options))
    prompts = [task.prompt(number) for number in range(20)] + task.held_out()
    for prompt in prompts:
        answer = prompt.ground_truth["answer"]
        assert prompt.text.startswith(prompt.ground_truth["question"].strip()) and "<answer>" in prompt.text
        assert TOKENIZER.decode(prompt.token_ids) == f"<user>{prompt.text}</s><assistant>"
        assert reward(prompt, f"I think <answer>1</answer>, no: <answer>\n{answer} </answer>").score == 1.0
        assert reward(prompt, f"<answer>{answer}</answer> <answer>x{answer[1:]}9</answer>").score < 1.0
        assert reward(prompt, f"It is {answer}").score == 0.0  # without the tags
    assert len({prompt.text for prompt in prompts}) > 30


def test_the_last_number_can_be_the_answer():
    options = {"answer_format": "last_number"}
    task, reward = build("gcd", **options), build_reward("reasoning_gym:gcd", DataOptions(**options))
    prompt = task.prompt(0)
    assert "<answer>" not in prompt.text
    assert reward(prompt, f"9 and 12, so {prompt.ground_truth['answer']}.").score == 1.0
    assert (reward(prompt, "none").score, reward(prompt, "none").reason) == (0.0, "no answer")


def test_parameters_reach_the_generator():
    for least in (2, 5):
        task = build("chain_sum", task_options={"min_terms": least, "max_terms": least})
        assert all(task.prompt(number).ground_truth["metadata"]["num_terms"] == least for number in range(10))


def test_held_out_questions_are_never_trained_on():
    task = build("gcd", task_options={"max_value": 12}, held_out_prompts=15)
    held_out = {prompt.text for prompt in task.held_out()}
    trained = {task.prompt(number).text for number in range(500)}
    assert len(held_out) == 15 and len(trained) > 60 and not held_out & trained


def test_seeds_do_not_share_questions_and_a_resumed_run_continues_with_its_own():
    tasks = [build("gcd", seed=seed) for seed in range(2)]
    one, other = ([task.prompt(number).text for number in range(300)] for task in tasks)
    assert len(set(one) & set(other)) < 30  # in the package itself, entry i + 1 of one seed is entry i of the next
    again = build("gcd", seed=1)
    assert [again.prompt(number).text for number in range(40, 50)] == other[40:50]


def test_a_task_with_too_few_questions_is_refused():
    tiny = {"min_word_len": 3, "max_word_len": 3}
    with pytest.raises(UserError, match=r"has hardly more than .* different questions; lower data\.held_out_prompts=3000"):
        build("spell_backward", task_options=tiny, held_out_prompts=3000)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("leg_count", {}, "reasoning-gym has no task leg_count; did you mean leg_counting"),
        ("gcd", {"task_options": {"max_valu": 3}}, "max_valu is no parameter of task=reasoning_gym:gcd; did you mean max_value"),
        ("gcd", {"task_options": {"seed": 3}}, "data.task_options.seed is no parameter"),
        ("gcd", {"task_options": {"min_value": 9, "max_value": 3}}, "task=reasoning_gym:gcd refuses data.task_options=.*AssertionError"),
        ("gcd", {"answer_format": "tag"}, "data.answer_format=tag is not known; did you mean tags"),
        ("gcd", {"path": ["a"]}, r"data.path=\['a'\] has no use in task=reasoning_gym:gcd"),
        ("gcd", {"max_prompt_tokens": 9}, "raise data.max_prompt_tokens=9"),
        ("zebra_puzzles", {}, "needs the package pycosat, which is not installed; pip install pycosat"),
        ("game_of_life", {}, "needs the package cellpylib, which is not installed"),
        ("countdown", {}, "its score evaluates the response as Python code"),
    ],
)
def test_an_impossible_task_is_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        build(name, **options)


def test_every_task_whose_score_evaluates_the_response_is_refused():
    """They are found in the package's source, so that a new version with more of them is noticed."""
    found = set()
    reasoning_gym._import_package()
    for name, (kind, _) in importlib.import_module("reasoning_gym.factory").DATASETS.items():
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
        calls = {node.func.id if isinstance(node.func, ast.Name) else node.func.attr for node in ast.walk(tree) if _is_named_call(node)}
        if calls & {"eval", "exec", "parse_expr", "sympify"} and ("score_answer" in vars(kind) or name == "codeio"):
            found.add(name)
    assert found >= EVALUATING
    assert found - EVALUATING == {"number_sorting", "basic_arithmetic", "bitwise_arithmetic"} & found  # these evaluate their own text


def _is_named_call(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)


def test_packages_that_only_a_few_tasks_use_may_be_missing():
    assert [name for name in ("cellpylib", "pycosat", "zss") if importlib.util.find_spec(name)] == []  # the lock leaves them out
    assert reasoning_gym._import_package() == ["cellpylib", "pycosat", "zss"]
    assert build("leg_counting").prompt(0).text
