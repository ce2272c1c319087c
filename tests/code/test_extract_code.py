"""The program in a response."""

import pytest

from megatron_aspo.rewards.code.extract import extract_code


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
    ],
)
def test_the_last_complete_block_counts(response, code):
    assert extract_code(response) == code
