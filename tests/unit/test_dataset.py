"""The task `dataset`: rows read from each format and layout, and refusals."""

import bz2
import datetime
import gzip
import json
import lzma
import os
from collections import Counter
from fractions import Fraction

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.data import store
from megatron_aspo.data.encoder import PromptEncoder
from megatron_aspo.data.order import choose_source
from megatron_aspo.data.store import with_answer
from megatron_aspo.tasks.options import DataOptions
from megatron_aspo.tasks.task import build_task
from tests.tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
VERL = {
    "data_source": "math",
    "prompt": [{"role": "user", "content": "What is 1 + 1?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 5, "split": "train"},
}
ARCHER2 = {"prompt": "Write a program that prints 1.", "ground_truth": '{"inputs": [""], "outputs": ["1"]}', "ability": "code"}


def build(seed=0, **options):
    options = DataOptions(**{"reward": "tests.unit.user_rewards:length", **options})
    return build_task("dataset", options, PromptEncoder(TOKENIZER, len(TOKENIZER), options), seed)


def all_prompts(task, count):
    return sorted((with_answer(task.prompt(number)) for number in range(count)), key=lambda prompt: prompt.position)


def rendered(prompt):
    return TOKENIZER.decode(prompt.token_ids)


def save(path, rows, kind):
    """Write the rows in one of the formats; return the location."""
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "array":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


@pytest.fixture
def read(tmp_path):
    def read(content: str | bytes, **options):
        path = tmp_path / "data.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return build(path=[str(path)], **options)

    return read


def test_rows_keep_all_their_fields(read):
    rows = [
        {"prompt": "plain é", "answer": [1, {"a": None}], "level": 3},
        {"prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}], "ground_truth": 7, "answer": 8, "id": "q1"},
        {"prompt": "again", "ground_truth": None, "data_source": "mine", "id": 12},
    ]
    task = read("\ufeff" + "\r\n\n".join(json.dumps(row) for row in rows))
    by_id = {p.id: p for p in (with_answer(task.prompt(i)) for i in range(3))}
    assert set(by_id) == {"train/1", "train/q1", "train/12"}
    plain, chat, last = by_id["train/1"], by_id["train/q1"], by_id["train/12"]
    assert (plain.text, plain.ground_truth, plain.extra, plain.data_source) == ("plain é", [1, {"a": None}], {"level": 3}, "dataset")
    assert TOKENIZER.decode(plain.token_ids) == "plain é"
    assert (chat.text, chat.ground_truth, chat.extra) == ("hi", 7, {"answer": 8})
    assert TOKENIZER.decode(chat.token_ids) == "<system>be</s><user>hi</s><assistant>"
    assert (last.ground_truth, last.data_source, last.extra) == (None, "mine", {"data_source": "mine"})


def test_a_file_is_drawn_in_shuffled_epochs(read):
    task = read("".join(json.dumps({"prompt": f"p{i}", "answer": i}) + "\n" for i in range(20)))
    first, second = ([with_answer(task.prompt(20 * epoch + i)).ground_truth for i in range(20)] for epoch in range(2))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second and first != list(range(20))


def test_held_out_prompts_come_from_their_own_file(read, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "b", "answer": 1}\n{"prompt": "a", "answer": 2}\n')
    good = '{"prompt": "x", "answer": 1}'
    assert [(p.id, p.text) for p in read(good, eval_path=[str(other)]).held_out()] == [("eval/1", "b"), ("eval/2", "a")]
    with pytest.raises(UserError, match=r"needs data\.eval_path"):
        read(good).held_out()
    with pytest.raises(UserError, match=r"nowhere\.jsonl cannot be read \(no such file or directory\)"):
        read(good, eval_path=[str(tmp_path / "nowhere.jsonl")])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "not valid JSON"),
        ('{"prompt": "x", "answer": NaN}', "not valid JSON .NaN is not JSON"),
        ('["x"]', "a JSON array, expected an object"),
        ('{"answer": 1}', "the field prompt is missing"),
        ('{"prompt": "x"}', r"the field ground_truth \(or answer, or reward_model.ground_truth\) is missing"),
        ('{"prompt": 3, "answer": 1}', "prompt is a JSON number, expected a string or a list of messages"),
        ('{"prompt": "", "answer": 1}', "prompt is a JSON empty string"),
        ('{"prompt": "\\ud800", "answer": 1}', "half of a surrogate pair"),
        ('{"prompt": [], "answer": 1}', "prompt is an empty list"),
        ('{"prompt": ["x"], "answer": 1}', r"prompt\[0\] is not a message"),
        ('{"prompt": [{"role": "tool", "content": "x"}], "answer": 1}', r"prompt\[0\] has role 'tool'"),
        ('{"prompt": [{"role": "user", "content": ["x"]}], "answer": 1}', r"prompt\[0\].content is a JSON array"),
        ('{"prompt": [{"role": "assistant", "content": "x"}], "answer": 1}', "the last message is the assistant's"),
        ('{"prompt": "x", "answer": 1, "id": 1.5}', "id is a JSON number"),
        ('{"prompt": "x", "answer": 1, "id": "1"}', r"id '1' is also that of .*data\.jsonl:1; ids must differ"),
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
        (b"PK\x03\x04", "a zip file"),
        (b"ARROW1\x00\x00", "an Arrow file; write its rows as Parquet"),
        ('{"prompt": "x", "answer": 1}'.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
    ],
)
def test_a_file_of_another_format_is_refused_naming_the_format(read, content, kind):
    with pytest.raises(UserError, match=rf"data\.jsonl is {kind}"):
        read(content)


def test_an_empty_file_is_refused(read):
    for content in ("", "\n \n", "[]"):
        with pytest.raises(UserError, match=r"data\.jsonl holds no prompts"):
            read(content)


@pytest.mark.parametrize("kind", ["jsonl", "array", "parquet", "directory"])
def test_every_format_holds_the_same_rows(tmp_path, kind):
    rows = [VERL | {"extra_info": {"index": n}, "reward_model": {"style": "rule", "ground_truth": str(n)}} for n in range(5)]
    prompts = all_prompts(build(path=[save(tmp_path / "data", rows, kind)]), 5)
    assert [prompt.id for prompt in prompts] == [f"train/{n}" for n in range(1, 6)]
    assert [prompt.ground_truth for prompt in prompts] == ["0", "1", "2", "3", "4"]
    assert {rendered(prompt) for prompt in prompts} == {"<user>What is 1 + 1?</s><assistant>"}
    assert {prompt.data_source for prompt in prompts} == {"math"}
    assert prompts[3].extra == {"data_source": "math", "ability": "math", "extra_info": {"index": 3}}


def test_the_published_layout_is_chat_whether_text_or_messages(read):
    messages = json.dumps([{"role": "system", "content": "be"}, {"role": "user", "content": "[1] hi"}])
    rows = [ARCHER2, ARCHER2 | {"prompt": messages}, ARCHER2 | {"prompt": "[1, 2] is a list. Sum it."}]
    prompts = all_prompts(read("\n".join(json.dumps(row) for row in rows)), 3)
    assert [rendered(prompt) for prompt in prompts] == [
        "<user>Write a program that prints 1.</s><assistant>",
        "<system>be</s><user>[1] hi</s><assistant>",
        "<user>[1, 2] is a list. Sum it.</s><assistant>",
    ]
    assert {prompt.data_source for prompt in prompts} == {"code"} and prompts[0].ground_truth == ARCHER2["ground_truth"]


def test_a_null_in_a_column_is_a_missing_field(tmp_path):
    rows = [{"prompt": "x", "answer": 1, "level": None}, {"prompt": "y", "answer": 2, "level": 3}]
    assert [prompt.extra for prompt in all_prompts(build(path=[save(tmp_path / "a", rows, "parquet")]), 2)] == [{}, {"level": 3}]


def test_an_array_is_read_across_chunk_boundaries(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_aspo.data.json_rows._CHUNK", 7)
    rows = [{"prompt": f'é\\ "{n}" 🙂' * n, "answer": [n, {"a": [True, None, -1.5e3, 10**25]}]} for n in range(1, 30)]
    path = tmp_path / "rows.json"
    for ascii_only in (True, False):
        path.write_text(" \n" + json.dumps(rows, ensure_ascii=ascii_only) + "\n ", encoding="utf-8")
        prompts = all_prompts(build(path=[str(path)]), 29)
        assert [prompt.text for prompt in prompts] == [row["prompt"] for row in rows]
        assert [prompt.ground_truth for prompt in prompts] == [row["answer"] for row in rows]


GOOD = '{"prompt": "x", "answer": 1}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"[{GOOD}, {{oops}}]", r"a row 2: not valid JSON \(Expecting property name"),
        (f"[{GOOD}, 3]", "a row 2: a JSON number, expected an object"),
        (f"[{GOOD}", "a row 2: not valid JSON .the file ends within the array"),
        (f"[{GOOD},", "a row 2: not valid JSON .the file ends within the array"),
        (f'[{GOOD}, {{"prompt": "x', "a row 2: not valid JSON .Unterminated string"),
        (f"[{GOOD} {GOOD}]", "a row 2: not valid JSON .expected a comma or the end of the array"),
        (f"[{GOOD}] {GOOD}", "a row 2: not valid JSON .something follows the end of the array"),
        (f'[{GOOD}, {{"prompt": "x", "answer": NaN}}]', "a row 2: not valid JSON .NaN is not JSON"),
        (f'[{GOOD}, {{"prompt": "x", "answer": 1, "answer": 2}}]', "a row 2: not valid JSON .the key 'answer' occurs twice"),
        (f'[{GOOD}, {{"prompt": "\\ud800", "answer": 1}}]', "a row 2: 'prompt' holds half of a surrogate pair"),
        (f"[{GOOD}, {{}}]", "a row 2: the field prompt is missing; add it"),
        (f'[{GOOD}, {{"problem": "1+1", "answer": 1}}]', "prompt is missing; add it; tools/prepare_data.py makes prompts of rows that"),
        (b"[" + GOOD.encode() + b', {"prompt": "\xff"}]', "a row [12], or soon after it, is not UTF-8"),
        ("[" * 100_000, "a row 1: not valid JSON"),
    ],
)
def test_a_faulty_row_of_an_array_is_named(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        build(path=[str(tmp_path / "a")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward_model": "2"}, "reward_model is a JSON string, expected an object with ground_truth"),
        ({"reward_model": {"style": "rule", "ground_truth": None}}, "the field reward_model.ground_truth is missing"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": [{"role": "tool", "content": "x"}]}, r"prompt\[0\] has role 'tool'"),
        ({"prompt": [{"role": "user", "content": None}]}, r"prompt\[0\].content is a JSON null"),
        ({"prompt": None}, "the field prompt is missing"),
        ({"data_source": 7}, "data_source is a JSON number, expected a string"),
    ],
)
def test_a_faulty_row_of_a_parquet_file_is_named(tmp_path, change, message):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist([VERL | change]), path)
    with pytest.raises(UserError, match=rf"rows\.parquet row 1: {message}"):
        build(path=[str(path)])


def test_a_parquet_file_that_is_damaged_or_has_other_types_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    good = pa.Table.from_pylist([{"prompt": "x" * 50, "answer": n} for n in range(1000)])
    parquet.write_table(good, path)
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole[:100] + bytes(2000) + whole[2100:], b"PAR1\x15\x04"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"rows\.parquet cannot be read as a Parquet file .* damaged or incomplete"):
            build(path=[str(path)])
    for value, name in ((datetime.date(2024, 8, 1), "when"), (b"x", "when"), ({"a": [b"x"]}, r"when\.a\[\]")):
        parquet.write_table(pa.Table.from_pylist([{"prompt": "x", "answer": 1, "when": value}]), path)
        with pytest.raises(UserError, match=rf"rows\.parquet: column {name} has the type"):
            build(path=[str(path)])


def test_directories_name_their_splits(tmp_path):
    rows = [{"prompt": "x", "answer": 1}]
    data = datasets.DatasetDict(train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows * 2))
    data.save_to_disk(str(tmp_path / "both"))
    task = build(path=[f"{tmp_path}/both@train"], eval_path=[f"{tmp_path}/both@test"])
    assert (task.prompt(1).id, len(task.held_out())) == ("train/1", 2)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="one of the locations of data is empty"):
        build(path=["", f"{tmp_path}/both@train"])
    for location, message in (
        ("both", "both has several splits; name one of @train, @test"),
        ("both@dev", "both has no split dev; name one of @train, @test"),
        ("nothing@train", r"nothing@train cannot be read \(no such file or directory\)"),
        ("pipe", r"pipe cannot be read \(neither a file nor a directory\)"),
    ):
        with pytest.raises(UserError, match=message):
            build(path=[f"{tmp_path}/{location}"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty cannot be loaded as a Hugging Face data set"):
        build(path=[f"{tmp_path}/empty"])


def test_a_directory_of_parquet_files_is_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    for n in range(2):
        save(tmp_path / "data" / f"train-{n}.parquet", [{"prompt": "x", "answer": n}], "parquet")
    assert [prompt.ground_truth for prompt in all_prompts(build(path=[f"{tmp_path}/data"]), 2)] == [0, 1]


def test_an_unreachable_hub_name_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/nothing-here cannot be loaded as a Hugging Face data set"):
        build(path=["hub:nobody/nothing-here:main@train"])


def two_files(directory, *sizes):
    """Write a.parquet and b.jsonl, with different rows."""
    return [
        save(directory / f"{name}.{kind}", [{"prompt": f"{name}{n}", "answer": n} for n in range(size)], kind)
        for name, kind, size in zip("ab", ("parquet", "jsonl"), sizes, strict=True)
    ]


def test_several_locations_are_shuffled_together(tmp_path):
    paths = two_files(tmp_path, 3, 5)
    task = build(path=paths)
    epochs = [[task.prompt(8 * epoch + n).id for n in range(8)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [f"train/a/{n}" for n in range(1, 4)] + [f"train/b/{n}" for n in range(1, 6)]
    assert epochs[0] != epochs[1]
    assert {name.split("/")[1] for name in epochs[0][:4]} == {"a", "b"}


def test_files_of_the_same_name_have_different_ids(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    paths = [save(tmp_path / name / "train.jsonl", [{"prompt": name, "answer": 1}], "jsonl") for name in ("one", "two")]
    task = build(path=paths)
    assert {task.prompt(n).id for n in range(2)} == {"train/train/1", "train/train-2/1"}


def test_weights_are_the_shares_of_the_draws_and_each_location_has_its_own_epochs(tmp_path):
    paths = two_files(tmp_path, 4, 50)
    task = build(path=paths, weights=[3, 1])
    ids = [task.prompt(n).id for n in range(160)]
    assert Counter(name.split("/")[1] for name in ids) == {"a": 120, "b": 40}
    of_a = [name for name in ids if "/a/" in name]
    assert all(sorted(of_a[4 * epoch : 4 * epoch + 4]) == [f"train/a/{n}" for n in range(1, 5)] for epoch in range(30))
    assert len({name for name in ids if "/b/" in name}) == 40
    assert [build(path=paths, weights=[3, 1]).prompt(n).id for n in range(80, 160)] == ids[80:]  # a resumed run
    with pytest.raises(UserError, match=r"data\.weights has 1 numbers for 2 locations"):
        build(path=paths, weights=[1])
    with pytest.raises(UserError, match="each must be greater than 0"):
        build(path=paths, weights=[1, 0])


@pytest.mark.parametrize("weights", [[1], [1, 1], [0.7, 0.2, 0.1], [5, 1, 1, 3], [1e-3, 1], [2, 3.5, 0.25, 1, 1]])
def test_a_mixture_is_never_a_draw_or_more_from_its_shares_for_each_other_source(weights):
    seen = [0] * len(weights)
    total = sum(Fraction(str(weight)) for weight in weights)
    for index in range(3000):
        source, before = choose_source(weights, index)
        assert before == seen[source]
        seen[source] += 1
        shares = [(index + 1) * Fraction(str(weight)) / total for weight in weights]
        assert all(abs(count - share) < len(weights) for count, share in zip(seen, shares, strict=True))


def test_long_prompts_are_left_out_and_counted(tmp_path):
    rows = [{"prompt": "x" * n, "answer": n} for n in (5, 51, 50, 99)]
    path = save(tmp_path / "a.jsonl", rows, "jsonl")
    task = build(path=[path], max_prompt_tokens=50, drop_long_prompts=True)
    assert {prompt.ground_truth for prompt in all_prompts(task, 4)} == {5, 50}
    assert task.remarks == [f"{path}: 2 rows left out, longer than data.max_prompt_tokens"]
    with pytest.raises(UserError, match=r"all 4 prompts of .* are longer than data\.max_prompt_tokens=4; raise it"):
        build(path=[path], max_prompt_tokens=4, drop_long_prompts=True)


def test_repetitions_and_overlap_are_reported_by_text_and_by_id(tmp_path):
    def asked(text):
        return {"prompt": [{"role": "user", "content": text}]}

    train = [VERL | asked(text) | {"extra_info": {"index": name}} for text, name in (("a", "u1"), ("b", "u2"), ("a", "u2"), ("c", "u4"))]
    held_out = [asked(text) | {"answer": 1, "id": name} for text, name in (("c", "q"), ("d", "u1"), ("e", "u9"))]
    paths = save(tmp_path / "train.jsonl", train, "jsonl"), save(tmp_path / "held.jsonl", held_out, "jsonl")
    assert build(path=[paths[0]], eval_path=[paths[1]]).remarks == [
        f"data: 1 training prompts have the text of an earlier one, such as {paths[0]}:1 and {paths[0]}:3",
        f"data: 1 held-out prompts have the text of a training prompt, such as {paths[1]}:1 and {paths[0]}:4",
        f"data: 1 training prompts have the id of an earlier one, such as {paths[0]}:2 and {paths[0]}:3",
        f"data: 1 held-out prompts have the id of a training prompt, such as {paths[1]}:2 and {paths[0]}:1",
    ]
    numbered = [row | {"extra_info": {"index": 0}} | asked(str(n)) for n, row in enumerate(train)]
    assert build(path=[save(tmp_path / "n.jsonl", numbered, "jsonl")]).remarks == []


def test_the_digest_changes_with_every_part_of_the_training_data(tmp_path):
    row = {"prompt": "x", "answer": 1, "level": 2}
    changed = [row, row | {"prompt": "y"}, row | {"answer": 2}, row | {"level": 3}, row | {"data_source": "a"}, row | {"id": "a"}]
    digests = [build(path=[save(tmp_path / "a.jsonl", [one], "jsonl")]).data_sha256 for one in changed]
    assert len(set(digests)) == len(digests)
    same = build(path=[save(tmp_path / "b.parquet", [row], "parquet")], eval_path=[save(tmp_path / "c.jsonl", [row], "jsonl")])
    assert same.data_sha256 == digests[0]


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_PREPARE", store._PREPARE + "PRAGMA max_page_count = 3;")
    path = save(tmp_path / "a.jsonl", [{"prompt": "x", "answer": [n * 7919**3 % 100_003 for n in range(30_000)]}] * 5, "jsonl")
    with pytest.raises(UserError, match=r"the prompts cannot be kept in a temporary file \(database or disk is full\).*TMPDIR"):
        build(path=[path])
