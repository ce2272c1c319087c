"""Tests of problems, read from the formats of public data sets."""

import base64
import json
import pickle
import zlib

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.rewards.code import schemas
from megatron_aspo.rewards.code.schemas import AssertTest, CallTest, StdinTest, check_ground_truth, choose_tests, read_tests

LCB = [
    {"input": "1\n", "output": "2\n", "testtype": "stdin", "metadata": {}},
    {"input": '[1, 2]\n"a"', "output": "true", "testtype": "functional", "metadata": {"func_name": "f"}},
]
LCB_TESTS = [StdinTest("1\n", "2\n"), CallTest("f", [[1, 2], "a"], True)]


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


@pytest.mark.parametrize(
    ("truth", "tests"),
    [
        (LCB, LCB_TESTS),
        (json.dumps(LCB), LCB_TESTS),
        (packed(json.dumps(LCB)), LCB_TESTS),
        ('{"inputs": ["1", ["a", "b"]], "outputs": ["2", "3"]}', [StdinTest("1", "2"), StdinTest("a\nb", "3")]),
        ({"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}, [CallTest("add", [1, 2], 3)]),
        ('{"functional": "assert f(1)"}', [AssertTest("assert f(1)")]),
        (
            {"test": "def check(c): ...", "entry_point": "f", "prompt": "def f(): ..."},
            [AssertTest("def check(c): ...\ncheck(f)\n", "def f(): ...", "f")],
        ),
    ],
)
def test_each_format_is_read(truth, tests):
    assert read_tests(truth) == tests


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (7, "no known form"),
        ({}, "no known form"),
        ([], "no tests"),
        ({"inputs": [], "outputs": []}, "no tests"),
        ({"inputs": ["1"], "outputs": []}, "same length"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}, "list of arguments"),
        ("words", "neither JSON nor"),
        (packed(["a list"]), "hold the pickle instruction EMPTY_LIST; they must be a pickled string"),
        (packed(print), "hold the pickle instruction STACK_GLOBAL"),
        ([{"input": 1, "output": "2"}], "test 0 of ground_truth has no texts"),
        ([{"input": "1", "output": "2", "testtype": "other"}], "testtype='other'"),
        ([{"input": "1", "output": "2", "testtype": "functional"}], "func_name"),
        ([{"input": "x", "output": "2", "testtype": "functional", "metadata": {"func_name": "f"}}], "not one JSON value a line"),
        ({"functional": 3}, "no text functional"),
        ({"functional": "assert f()", "entry_point": None}, "no text entry_point"),
        ({"test": "def check(c): ...", "entry_point": "f", "prompt": None}, "no text prompt"),
        ([{"input": "1", "output": "2", "testtype": "functional", "metadata": ""}], "test 0 of ground_truth has metadata that is not JSON"),
        ([{"input": "[" * 9000, "output": "2", "testtype": "functional", "metadata": {"func_name": "f"}}], "not one JSON value a line"),
        ("[" * 9000, "nested too deeply"),
        ({"inputs": [[1]], "outputs": [1], "fn_name": 3}, "fn_name=3"),
        ({"inputs": [None], "outputs": ["1"]}, "null among inputs"),
    ],
)
def test_a_faulty_ground_truth_is_refused_with_the_reason(truth, message):
    for read in (read_tests, check_ground_truth):
        with pytest.raises(UserError, match=message):
            read(truth)


def test_large_packed_tests_are_checked_by_their_beginning(monkeypatch):
    tests = [{**LCB[0], "input": str(number**3)} for number in range(99)]
    large = packed(json.dumps(tests))
    monkeypatch.setattr(schemas, "_LARGE_PACKED", 256)
    monkeypatch.setattr(schemas, "read_tests", lambda *_: pytest.fail("unpacked as a whole"))
    assert len(large) > 256
    check_ground_truth(large)
    for bad in ("words " * 100, "QUJD" * 100, packed(" ".join(str(number**3) for number in range(99))), packed(7) + " " * 500):
        with pytest.raises(UserError, match="neither JSON nor"):
            check_ground_truth(bad)


def test_packed_tests_execute_no_code_and_have_a_size_limit(monkeypatch):
    class Evil:
        def __reduce__(self):
            return exec, ("raise SystemExit('executed')",)

    with pytest.raises(UserError, match="hold the pickle instruction STACK_GLOBAL"):
        read_tests(packed(Evil()))
    whole = packed(json.dumps(LCB))
    for damaged in (whole[:-8], whole[:40], base64.b64encode(base64.b64decode(whole)[:-9]).decode()):
        with pytest.raises(UserError, match="neither JSON nor"):
            read_tests(damaged)
    for protocol in range(2, 6):
        text = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(LCB), protocol))).decode()
        assert read_tests(text) == LCB_TESTS
    for payload in (b"\x80\x04\x8c\x01[\x94\x8c\x01]\x94.", b"\x80\x04.", b"\x80\x04\x8c\x02[]\x94h\x00.", b"\x80\x04(lp0\n."):
        with pytest.raises(UserError, match="packed tests that"):
            read_tests(base64.b64encode(zlib.compress(payload)).decode())
    monkeypatch.setattr(schemas, "MAX_UNPACKED_BYTES", 1 << 20)
    with pytest.raises(UserError, match="neither JSON nor"):
        read_tests(packed("x" * (2 << 20)))


def test_the_choice_of_tests_is_even_and_deterministic():
    assert choose_tests(5, 0) == choose_tests(5, 9) == [0, 1, 2, 3, 4]
    assert choose_tests(10, 4) == [0, 3, 6, 9]
    assert choose_tests(10, 1) == [0]
    assert all(len(set(choose_tests(count, limit))) == limit for count in range(2, 40) for limit in range(1, count))


def test_the_fields_of_a_livecodebench_row_are_both_lists_of_tests(monkeypatch):
    functional = [{"input": "1\n2", "output": "3", "testtype": "functional"}, {"input": "3\n4", "output": "7", "testtype": "functional"}]
    row = {"public_test_cases": json.dumps(functional[:1]), "private_test_cases": packed(json.dumps(functional[1:]))}
    row["metadata"] = json.dumps({"func_name": "add"})
    expected = [CallTest("add", [1, 2], 3), CallTest("add", [3, 4], 7)]
    assert read_tests(row) == read_tests(json.dumps(row)) == expected
    assert read_tests(row | {"private_test_cases": functional[1:]}) == expected
    for change, message in (
        ({"private_test_cases": 3}, "private_test_cases is no list of tests"),
        ({"public_test_cases": "words"}, "neither JSON nor"),
        ({"private_test_cases": "[]", "public_test_cases": "[]"}, "ground_truth has no tests"),
        ({"metadata": "{}"}, "has no metadata.func_name"),
    ):
        with pytest.raises(UserError, match=message):
            read_tests(row | change)
    monkeypatch.setattr(schemas, "_LARGE_PACKED", 16)
    unpack = schemas._unpack
    monkeypatch.setattr(schemas, "_unpack", lambda *_: pytest.fail("unpacked as a whole"))
    check_ground_truth(row)
    check_ground_truth(row | {"public_test_cases": "[]"})
    for change in ({"private_test_cases": "QUJD" * 100}, {"public_test_cases": '[{"input": 1}]'}):
        with pytest.raises(UserError):
            check_ground_truth(row | change)
    monkeypatch.setattr(schemas, "_unpack", unpack)
