"""Procedural tasks: which prompts are drawn, which are held out, how they are scored."""

import re

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.encoder import PromptEncoder
from megatron_aspo.data.order import shuffled_position
from megatron_aspo.tasks.options import DataOptions
from megatron_aspo.tasks.task import build_reward, build_task
from tests.tokenizers import byte_tokenizer

PROCEDURAL = ("single_digit_addition", "largest_of_three")
TOKENIZER = byte_tokenizer()


def build(name, seed=0, **options):
    options = DataOptions(**options)
    return build_task(name, options, PromptEncoder(TOKENIZER, len(TOKENIZER), options), seed)


def numbers(prompt):
    return [int(n) for n in re.findall(r"\d+", prompt.text)]


def test_an_epoch_draws_each_item_once_and_epochs_differ():
    epochs = [[shuffled_position(3, 50 * epoch + i, 50) for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert shuffled_position(3, 77, 50) == epochs[1][27]
    assert [shuffled_position(4, i, 50) for i in range(50)] != epochs[0]


@pytest.mark.parametrize("name", PROCEDURAL)
def test_training_prompts_depend_only_on_seed_and_index(name):
    first, again, other = build(name), build(name), build(name, seed=1)
    expected = [first.prompt(i) for i in range(30)]
    assert [again.prompt(i) for i in reversed(range(30))] == expected[::-1]
    assert [p.id for p in other.held_out()] != [p.id for p in first.held_out()]
    assert [p.id for p in first.held_out()] == [p.id for p in again.held_out()]
    assert [other.prompt(i).id for i in range(30)] != [p.id for p in expected]


@pytest.mark.parametrize("name", PROCEDURAL)
@pytest.mark.parametrize("seed", range(5))
def test_held_out_numbers_are_never_trained_on_in_any_order(name, seed):
    task = build(name, seed=seed, held_out_prompts=31)
    held_out = task.held_out()
    assert len(held_out) >= 31 and len({p.id for p in held_out}) == len(held_out)
    trained = {tuple(sorted(numbers(task.prompt(i)))) for i in range(500)}
    assert not trained & {tuple(sorted(numbers(p))) for p in held_out}


def test_every_sum_is_either_trained_on_or_held_out():
    task = build("single_digit_addition")
    held_out = {p.id for p in task.held_out()}
    trained = {task.prompt(i).id for i in range(100 - len(held_out))}
    assert held_out | trained == {f"single_digit_addition/{a}+{b}" for a in range(10) for b in range(10)}
    assert 20 <= len(held_out) <= 21


@pytest.mark.parametrize(("name", "answer"), [("single_digit_addition", sum), ("largest_of_three", max)])
def test_the_ground_truth_answers_the_question(name, answer):
    task, reward = build(name), build_reward(name, DataOptions())
    for prompt in [task.prompt(i) for i in range(100)] + task.held_out():
        truth = answer(numbers(prompt))
        assert prompt.ground_truth == truth
        assert TOKENIZER.decode(prompt.token_ids) == f"<user>{prompt.text}</s><assistant>"
        assert reward(prompt, f" {truth}\n").score == 1.0
        assert reward(prompt, str(truth + 1)).score == 0.0


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"data\.path=\['x.jsonl'\] has no use in task=largest_of_three; remove it, or set task=dataset"):
        build("largest_of_three", path=["x.jsonl"])
    with pytest.raises(UserError, match=r"data\.reward=a:b has no use"):
        build_reward("single_digit_addition", DataOptions(reward="a:b"))
    with pytest.raises(UserError, match="held_out_prompts=100 leaves none"):
        build("single_digit_addition", held_out_prompts=100)
    with pytest.raises(UserError, match=r"data\.held_out_prompts=-1 must be greater than 0"):
        build("single_digit_addition", held_out_prompts=-1)
    with pytest.raises(UserError, match=r"raise data\.max_prompt_tokens=9"):
        build("single_digit_addition", max_prompt_tokens=9).prompt(0)
    with pytest.raises(UserError, match=r"needs data\.path"):
        build("dataset")
    with pytest.raises(UserError, match=r"needs data\.reward"):
        build("dataset", path=["x.jsonl"])


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match=r"did you mean largest_of_three.*tasks: single_digit_addition, largest_of_three, dataset, reas"):
        build("largest_of_tree")
