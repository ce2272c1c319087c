"""The mutation tester: the operators' mutants of small sources, the key of a mutant, and a whole run on a small package."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/prove/mutate_losses.py"


def load_mutants():
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tools/prove/mutants.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutants = load_mutants()


def mutants_of(source: str):
    return mutants.mutants(ast.parse(source), source, "some.py")


def mutated(source: str) -> list[str]:
    """Return the text of every mutant."""
    texts = []
    for mutant in mutants_of(source):
        old = mutant.apply()
        texts.append(ast.unparse(mutant.tree))
        mutants._replace(mutant.target, old)
        assert ast.unparse(mutant.tree) == ast.unparse(ast.parse(source)), "a mutant must leave no trace"
    return texts


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a < b", {"a <= b"}),
        ("a <= b", {"a < b"}),
        ("a > b >= c", {"a >= b >= c", "a > b > c"}),
        ("a == b", {"a != b"}),
        ("a is not b", {"a is b"}),
        ("a is None", {"a is not None"}),
        ("a in b", {"a not in b"}),
        ("a + b * c", {"a - b * c", "a + b / c"}),
        ("a - b / c", {"a + b / c", "a - b * c"}),
        ("a // b", {"a / b"}),
        ("a % b", {"a / b"}),
        ("a ** b", {"a * b"}),
        ("a & b | c", {"(a | b) | c", "a & b & c"}),
        ("a @ b", set()),
        ("-a", {"a"}),
        ("~a", {"a"}),
        ("not a", {"a"}),
        ("a += b", {"a -= b", "a = b"}),
        ("a and b", {"a or b"}),
        ("a and b and c", {"a or (b and c)", "(a and b) or c"}),
        ("a[1]", {"a[2]"}),
        ("a[0.5]", {"a[1.5]"}),
        ("a[True]", {"a[False]"}),
        ("a['Key']", {"a['XXKeyXX']", "a['key']", "a['KEY']"}),
        ("a[f'{b}/k']", {"a[f'{b}XX/kXX']", "a[f'{b}/K']"}),
        ("a[f'{b + c}']", {"a[f'{b - c}']"}),
        ("a = b", {"a = None"}),
        ("a = None", {"a = ''"}),
        ("a: int = b", {"a: int = None"}),
        ("def f():\n return a", {"def f():\n return None"}),
        ("def f(a=1): pass", {"def f(a=2): pass"}),
        ("lambda a: b", {"lambda a: None"}),
        ("f(a)", {"f(None)"}),
        (
            "f(a, *b, c=d, **e)",
            {"f(None,*b,c=d,**e)", "f(a,*b,c=None,**e)"} | {f"f({rest})" for rest in ("*b,c=d,**e", "a,c=d,**e", "a,*b,**e", "a,*b,c=d")},
        ),
        ("dict(a=b)", {"dict(aXX=b)", "dict(a=None)"}),
        ("while a:\n break", {"while a:\n return"}),
        ("while a:\n continue", {"while a:\n break"}),
        ("a.detach()", {"a"}),
        ("a.clamp(b)", {"a.clamp(None)", "a"}),
        ("torch.clamp(a, b)", {"torch.clamp(None, b)", "torch.clamp(a, None)", "torch.clamp(b)", "torch.clamp(a)", "a"}),
        ("if a: b\nelse: c", {"if not a: b\nelse: c"}),
        ("if not a: b", {"if a: b"}),
        ("if a != b: c", {"if a == b: c"}),
        ("if a < b: c", {"if a <= b: c", "if not a < b: c"}),
        ("[a for a in b if a]", {"[a for a in b if not a]"}),
        ("a if b else c", {"c if b else a", "a if b and False else c", "a if b or True else c"}),
        ("a.any()", {"a.all()"}),
        ("a.sum()", {"a.mean()"}),
        ("sum()", set()),
        ("torch.minimum()", {"torch.maximum()"}),
        ("max()", {"min()"}),
        ("a.lower()", {"a.upper()"}),
        ("copy.deepcopy()", {"copy.copy()"}),
        ("match a:\n case b.c: pass\n case _: pass", {"match a:\n case b.c: pass", "match a:\n case _: pass"}),
    ],
)
def test_operators(source, expected):
    found = mutated(source)
    assert sorted(found) == sorted(ast.unparse(ast.parse(text)) for text in expected)


@pytest.mark.parametrize("where", ["torch.where", "np.where"])
def test_the_branches_of_where_are_swapped(where):
    arguments = ["None, a, b", "c, None, b", "c, a, None", "a, b", "c, b", "c, a", "c, b, a"]
    assert sorted(mutated(f"{where}(c, a, b)")) == sorted(f"{where}({given})" for given in arguments)


LEFT_ALONE = '''"""Module."""
from __future__ import annotations
import a.b
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    x = 1 + 1
__all__ = ["f"]

class C:
    """Class."""
    field: dict[str, "int" | None]
    """What it is."""

    def f(self, a: Literal["x"] | None) -> Literal["y"]:
        """Function."""
'''


def test_code_without_effect_at_run_time_is_left_alone():
    assert mutated(LEFT_ALONE) == []


def test_a_key_identifies_a_mutant_without_line_numbers_even_among_others_on_its_line():
    source = "class C:\n    def f(self):\n        return g(\n            0, 0,\n        )\n"
    keys = [mutant.key for mutant in mutants_of(source)]
    assert len(set(keys)) == len(keys)
    zero = mutants.Key("some.py", "C.f", "0, 0,", "0 → 1")
    assert [key for key in keys if key.mutant.startswith("0 → 1")] == [zero, zero._replace(mutant="0 → 1 (2)")]
    assert [mutant.key for mutant in mutants_of(f"import os\n\n\n{source}")] == keys
    assert [mutant.line_number for mutant in mutants_of(f"import os\n\n\n{source}")] == [m.line_number + 3 for m in mutants_of(source)]


def test_a_diff_shows_the_changed_line_alone():
    (mutant,) = [mutant for mutant in mutants_of("a = 1\nb = c + d\n") if "-" in mutant.key.mutant]
    assert mutant.diff() == "-b = c + d\n+b = c - d"


SIGN = '''from megatron_aspo.losses.zero import ZERO

NAMES = {1: "Plus", -1: "Minus"}


def sign(x: float) -> int:
    """-1 or 1."""
    return 1 if x > ZERO else -1


def name(x: float) -> str:
    return NAMES[sign(x)]
'''
TEST = """from hypothesis import given, strategies
from megatron_aspo.losses.sign import name, sign


@given(strategies.integers(1, 100))
def test_sign(x):
    assert sign(x) == 1 and sign(-x) == -1
    assert name(x) == "Plus" and name(-x) == "Minus"
"""
AT_ZERO = {"file": "sign.py", "function": "sign", "line": "return 1 if x > ZERO else -1", "mutant": "x > ZERO → x >= ZERO"}


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Make a repository with two modules in losses/. Its tests cannot distinguish x > 0 from x >= 0."""
    files = {"megatron_aspo/losses/sign.py": SIGN, "megatron_aspo/losses/zero.py": "ZERO = 0\n", "tests/unit/test_losses_sign.py": TEST}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "tools" / "prove").mkdir(parents=True)
    return tmp_path


def list_equivalent(checkout: Path, *entries: dict) -> None:
    (checkout / "tools/prove/mutants_equivalent.yaml").write_text(yaml.safe_dump(list(entries), allow_unicode=True))


def run(checkout: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, TOOL, "--root", checkout, "--jobs", "2", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def test_a_whole_run_fails_for_a_survivor_until_it_is_listed_and_leaves_no_files(checkout):
    before = sorted(checkout.rglob("*"))
    status, output = run(checkout, "--print-survivors")
    assert status == 1
    assert "-    return 1 if x > ZERO else -1\n+    return 1 if x >= ZERO else -1\n" in output
    entries = output[output.index("- file:") : output.index(f"{'':16}mutants")]
    assert yaml.safe_load(entries) == [AT_ZERO | {"reason": ""}]
    assert json.loads(output.splitlines()[-1]) == {"mutants": 22, "killed": 21, "equivalent": 0}
    assert sorted(checkout.rglob("*")) == before

    list_equivalent(checkout, AT_ZERO | {"reason": "nothing is 0"})
    status, output = run(checkout)
    assert status == 0 and "-    return" not in output
    assert json.loads(output.splitlines()[-1]) == {"mutants": 22, "killed": 21, "equivalent": 1}


def test_the_list_names_nothing_but_survivors(checkout):
    killed = {"file": "zero.py", "function": "<module>", "line": "ZERO = 0", "mutant": "0 → 1"}
    gone = killed | {"line": "ZERO = 5"}
    list_equivalent(checkout, *(key | {"reason": "none"} for key in (AT_ZERO, killed, gone)))
    stale = "stale in tools/prove/mutants_equivalent.yaml"
    status, output = run(checkout)
    assert status == 1 and f"{stale} (killed): zero.py | <module> | ZERO = 0 | 0 → 1\n" in output
    assert f"{stale} (no such mutant): zero.py | <module> | ZERO = 5 | 0 → 1\n" in output
    # A partial run does not know the rest.
    status, output = run(checkout, "--only", "zero.py")
    assert status == 0 and f"{stale} (killed)" in output and "no such mutant" not in output

    list_equivalent(checkout, AT_ZERO | {"reason": ""})
    assert run(checkout)[0] == 2


def test_endless_mutants_are_killed_and_failing_tests_refused(checkout):
    (checkout / "megatron_aspo/losses/down.py").write_text("def down(n):\n    while n:\n        n -= 1\n    return n\n")
    test = checkout / "tests/unit/test_losses_down.py"
    test.write_text("from megatron_aspo.losses.down import down\n\n\ndef test_down():\n    assert down(3) == 0\n")
    status, output = run(checkout, "--only", "down.py", "--timeout", "3", "--jobs", "4")
    assert status == 0 and output.splitlines()[-2].split() == ["all", "4", "4", "3", "0", "0"]
    test.write_text("def test_down():\n    assert False\n")
    status, output = run(checkout)
    assert status == 2 and output.endswith("error: the tests fail without any mutant\n")


def test_a_sample_is_a_part_and_the_same_twice(checkout):
    _, everything = run(checkout, "--list")
    samples = [run(checkout, "--list", "--sample", "5", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert len(everything.splitlines()) == 22
    assert samples[0] == samples[1] != samples[2]
    assert all(len(sample.splitlines()) == 5 and set(sample.splitlines()) < set(everything.splitlines()) for sample in samples)
