"""Extraction of the program from a response."""

import time

import pytest

from megatron_aspo.rewards.code.extract import BLOCKS, extract_code


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("```python\nx\n```", "x\n"),
        ("Sure:\n```py\nx\n```\nDone.", "x\n"),
        ("```\nx\n```", "x\n"),
        ("```python\nfirst\n```\n```python\nlast\n```", "last\n"),
        ("```python\nx\n```\n```bash\npip install y\n```", "x\n"),
        ("```python\nx\n```\n```python\ncut off", "x\n"),
        ("<think>\n```python\nx\n```\n</think>\nno code", None),
        ("<think>a</think>b</think>```python\nx\n```", "x\n"),
        ("<think>a</think>\n```Python3\nx\n```", "x\n"),
        ("```python\ncut off", None),
        ("no code", None),
        ("", None),
        ("```python\n```", ""),
        ("````python\na = '''\n```\n'''\n````", "a = '''\n```\n'''\n"),
        ("~~~python\nx\n~~~", "x\n"),
        ("  ```python title=a\n  x\n  ```", "  x\n"),
        ("```cpp\nint x;\n```", None),
        ("Use ```inline``` code", None),
        ("```python\nx = 1\n```\r\n", "x = 1\n"),
        ("```  \tpython\r\nx\n``` \t", "x\n"),
        ("~~~~python\nx\n~~~\n~~~~", "x\n~~~\n"),
    ],
)
def test_the_last_complete_block_counts(response, code):
    assert extract_code(response) == code


@pytest.mark.parametrize(
    "line", ["```" + "a" * 100_000 + "`", "```" + " " * 100_000 + "`", "~" * 100_000 + "`", "`" * 100_000 + "x`", " " * 100_000]
)
def test_a_hostile_response_is_read_in_linear_time(line):
    started = time.monotonic()
    assert extract_code(line) is None
    assert time.monotonic() - started < 0.5


@pytest.mark.parametrize(
    ("response", "archer", "livecodebench"),
    [
        ("```python\nx\n```", "x\n", "x"),
        ("```python\na\n```\n```cpp\nb\n```", "a\n", "b"),
        ("<think>\n```python\na\n```</think>\n```python\nb\n```\n</think>\n```python\nc\n```", "c\n", "c"),
        ("<think></think>\n```python\nb\n```\n</think> no more", "b\n", "b"),
        ("<think>\n```python\na\n```\n</think> none", None, "a"),
        ("```\nx\n```", None, "x"),
        ("a ``` b\nx\n``` c", None, "x"),
        ("```python\ncut off", None, None),
        ("```python\na\n```\n```python\ncut off", "a\n", ""),
        ("", None, None),
    ],
)
def test_other_graders_choose_other_blocks(response, archer, livecodebench):
    """The rules follow the two graders' code: the last of these rows is why published results of one model differ."""
    assert (BLOCKS["archer"](response), BLOCKS["livecodebench"](response)) == (archer, livecodebench)
