"""Tasks: which prompts are drawn, which are held out, and how a file of prompts is read."""

import bz2
import gzip
import json
import lzma
import re

import pytest

from megatron_aspo.data.encoder import PromptEncoder
from megatron_aspo.data.options import DataOptions
from megatron_aspo.data.order import shuffled_position
from megatron_aspo.data.tasks import build_reward, build_task
from megatron_aspo.errors import UserError
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
def test_training_prompts_are_a_function_of_seed_and_index(name):
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
    with pytest.raises(UserError, match=r"data\.path=x.jsonl has no use in task=largest_of_three"):
        build("largest_of_three", path="x.jsonl")
    with pytest.raises(UserError, match=r"data\.reward=a:b has no use"):
        build_reward("single_digit_addition", DataOptions(reward="a:b"))
    with pytest.raises(UserError, match="held_out_prompts=100 leaves none"):
        build("single_digit_addition", held_out_prompts=100)
    with pytest.raises(UserError, match="is negative"):
        build("single_digit_addition", held_out_prompts=-1)
    with pytest.raises(UserError, match=r"raise data\.max_prompt_tokens=9"):
        build("single_digit_addition", max_prompt_tokens=9).prompt(0)
    with pytest.raises(UserError, match=r"needs data\.path"):
        build("jsonl")
    with pytest.raises(UserError, match=r"needs data\.reward"):
        build("jsonl", path="x.jsonl")


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match=r"did you mean largest_of_three.*tasks: single_digit_addition, largest_of_three, jsonl"):
        build("largest_of_tree")


@pytest.fixture
def read(tmp_path):
    def read(content: str | bytes, **options):
        path = tmp_path / "data.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return build("jsonl", path=str(path), reward="tests.unit.user_rewards:length", **options)

    return read


def test_rows_keep_what_they_hold(read):
    rows = [
        {"prompt": "plain é", "answer": [1, {"a": None}], "level": 3},
        {"prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}], "ground_truth": 7, "answer": 8, "id": "q1"},
        {"prompt": "again", "ground_truth": None, "data_source": "mine", "id": 12},
    ]
    task = read("\ufeff" + "\r\n\n".join(json.dumps(row) for row in rows))
    by_id = {p.id: p for p in (task.prompt(i) for i in range(3))}
    assert set(by_id) == {"train/1", "train/q1", "train/12"}
    plain, chat, last = by_id["train/1"], by_id["train/q1"], by_id["train/12"]
    assert (plain.text, plain.ground_truth, plain.extra, plain.data_source) == ("plain é", [1, {"a": None}], {"level": 3}, "jsonl")
    assert TOKENIZER.decode(plain.token_ids) == "plain é"
    assert (chat.text, chat.ground_truth, chat.extra) == ("hi", 7, {"answer": 8})
    assert TOKENIZER.decode(chat.token_ids) == "<system>be</s><user>hi</s><assistant>"
    assert (last.ground_truth, last.data_source, last.extra) == (None, "mine", {"data_source": "mine"})


def test_a_file_is_drawn_in_shuffled_epochs(read):
    task = read("".join(json.dumps({"prompt": f"p{i}", "answer": i}) + "\n" for i in range(20)))
    first, second = ([task.prompt(20 * epoch + i).ground_truth for i in range(20)] for epoch in range(2))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second and first != list(range(20))


def test_held_out_prompts_come_from_their_own_file(read, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "b", "answer": 1}\n{"prompt": "a", "answer": 2}\n')
    good = '{"prompt": "x", "answer": 1}'
    assert [(p.id, p.text) for p in read(good, eval_path=str(other)).held_out()] == [("eval/1", "b"), ("eval/2", "a")]
    with pytest.raises(UserError, match=r"needs data\.eval_path"):
        read(good).held_out()
    with pytest.raises(UserError, match=r"nowhere\.jsonl cannot be read \(No such file"):
        read(good, eval_path=str(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "not valid JSON"),
        ('{"prompt": "x", "answer": NaN}', "not valid JSON .NaN is not JSON"),
        ('["x"]', "a JSON array, expected an object"),
        ('{"answer": 1}', "the field prompt is missing"),
        ('{"prompt": "x"}', r"the field ground_truth \(or answer\) is missing"),
        ('{"prompt": 3, "answer": 1}', "prompt is a JSON number, expected a string or a list of messages"),
        ('{"prompt": "", "answer": 1}', "prompt is a JSON empty string"),
        ('{"prompt": "\\ud800", "answer": 1}', "half of a surrogate pair"),
        ('{"prompt": [], "answer": 1}', "prompt is an empty list"),
        ('{"prompt": ["x"], "answer": 1}', r"prompt\[0\] is not a message"),
        ('{"prompt": [{"role": "tool", "content": "x"}], "answer": 1}', r"prompt\[0\] has role 'tool'"),
        ('{"prompt": [{"role": "user", "content": ["x"]}], "answer": 1}', r"prompt\[0\].content is a JSON array"),
        ('{"prompt": [{"role": "assistant", "content": "x"}], "answer": 1}', "the last message is the assistant's"),
        ('{"prompt": "x", "answer": 1, "id": 1.5}', "id is a JSON number"),
        ('{"prompt": "x", "answer": 1, "id": "1"}', "is also that of line 1"),
        ('{"prompt": "x", "answer": 1, "data_source": null}', "data_source is a JSON null"),
        ('{"prompt": "x", "answer": 1, "data_source": "a\\udfff"}', "'data_source' holds half of a surrogate pair"),
        ('{"prompt": "x", "answer": 1, "id": "\\ud83d"}', "'id' holds half of a surrogate pair"),
        ('{"prompt": "x", "answer": {"a": ["\\ud83d"]}}', "'answer' holds half of a surrogate pair"),
        ('{"prompt": "x", "answer": 1, "\\ud83d": 1}', r"'\\ud83d' holds half of a surrogate pair"),
        ('{"prompt": "x", "answer": 1, "prompt": "y"}', "the key 'prompt' occurs twice in one object"),
        ('{"prompt": "x", "answer": {"a": 1, "b": 2, "a": 3}}', "the key 'a' occurs twice in one object"),
        ('{"prompt": "x", "ground_truth": null, "answer": "42"}', "ground_truth is null beside answer='42'; remove one"),
        ('{"prompt": "' + "x" * 51 + '", "answer": 1}', r"the prompt has 51 tokens, expected 1 to data\.max_prompt_tokens=50"),
    ],
)
def test_a_faulty_line_is_named(read, line, message):
    with pytest.raises(UserError, match=message) as caught:
        read('{"prompt": "x", "answer": 1}\n\n' + line, max_prompt_tokens=50)
    assert "data.jsonl:3:" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_line_that_is_not_utf8_is_named(read):
    with pytest.raises(UserError, match=r"data\.jsonl:2: byte 13 of the line is not UTF-8"):
        read(b'{"prompt": "x", "answer": 1}\n{"prompt": "\xff"}\n')


def test_a_whole_character_written_as_a_surrogate_pair_is_read(read):
    assert read('{"prompt": "\\ud83d\\ude42", "answer": 1}').prompt(0).text == "🙂"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (gzip.compress(b'{"prompt": "x", "answer": 1}', mtime=0), r"a gzip file; unpack it \(gunzip\)"),
        (lzma.compress(b"{}"), "an xz file"),
        (bz2.compress(b"{}"), "a bzip2 file"),
        (b"PAR1\x15\x04", "a Parquet file; write its rows as JSONL"),
        ('{"prompt": "x", "answer": 1}'.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
    ],
)
def test_a_file_of_another_format_is_called_what_it_is(read, content, kind):
    with pytest.raises(UserError, match=rf"data\.jsonl is not JSONL but {kind}"):
        read(content)


@pytest.mark.parametrize("content", ['[{"prompt": "x", "answer": 1}]', '[\n  {"prompt": "x", "answer": 1}\n]\n'])
def test_a_file_that_is_one_json_array_is_told_what_to_be(read, content):
    with pytest.raises(UserError, match="a file that is one JSON array has to be written as a line for each of its elements"):
        read(content)


def test_an_empty_file_is_refused(read):
    for content in ("", "\n \n"):
        with pytest.raises(UserError, match=r"data\.jsonl holds no prompts"):
            read(content)
