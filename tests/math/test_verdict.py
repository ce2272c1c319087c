"""Right and wrong answers: pairs judged by hand, formulas made by SymPy, answers that cost time, answers that are programs."""

import random
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import sympy

from megatron_aspo.common.errors import UserError
from megatron_aspo.rewards.math import verdict as module
from megatron_aspo.rewards.math.options import MathOptions
from megatron_aspo.rewards.math.verdict import verdict
from tests.math.pairs import ELSEWHERE, GROUPS, PAIRS

ROOT = Path(__file__).parents[2]
LIMIT_S = 1.0
"""CPU time: far above that of an exact comparison, and below that of other graders on any of these answers."""


@pytest.mark.parametrize("group", GROUPS)
def test_a_pair_gets_the_mathematically_right_verdict_in_both_directions(group):
    wrong = []
    for answer, gold, equal in GROUPS[group]:
        for pair in ((answer, gold), (gold, answer)):
            given = verdict(*pair)
            if given.correct is not equal or not given.reason:
                wrong.append((*pair, given))
    assert not wrong


def test_there_are_enough_pairs_and_each_answer_equals_itself():
    assert len(PAIRS) >= 250
    assert len({pair[:2] for pair in PAIRS}) == len(PAIRS)
    texts = {text for pair in PAIRS for text in pair[:2] if text}
    assert all(verdict(f" {text} ", text).correct for text in texts)


X, Y = sympy.symbols("x y", positive=True)
LEAVES = [X, Y, *map(sympy.Integer, (1, 2, 3, 5)), sympy.Rational(1, 2), sympy.pi, sympy.sqrt(2)]


def _formula(choose: random.Random, depth: int) -> sympy.Expr:
    if depth == 0:
        return choose.choice(LEAVES)
    left, right = _formula(choose, depth - 1), _formula(choose, choose.randrange(depth))
    make = choose.choice(
        [
            lambda: left + right,
            lambda: left - right,
            lambda: left * right,
            lambda: left / (right**2 + 1),
            lambda: left**2,
            lambda: sympy.sqrt(left**2 + 1),
            lambda: sympy.sin(left),
            lambda: sympy.exp(right),
            lambda: sympy.log(right**2 + 2),
        ]
    )
    return make()


def test_forms_that_sympy_makes_of_a_formula_are_equal_and_neighbours_are_not():
    choose = random.Random(7)
    for _ in range(25):
        formula = _formula(choose, 3)
        forms = {sympy.latex(form) for form in (formula, sympy.expand(formula), sympy.together(formula), sympy.factor(formula))}
        for form in forms:
            assert verdict(form, sympy.latex(formula)).correct, (form, formula)
        for other in (formula + 1, formula * 2 + 1, formula + X / 1000, -formula - 1):
            if not formula.equals(other):
                assert not verdict(sympy.latex(other), sympy.latex(formula)).correct, (other, formula)


def test_mutilated_answers_get_symmetric_verdicts_and_raise_nothing(monkeypatch):
    monkeypatch.setattr(module, "math_verify_equal", lambda *_: (False, "not asked here"))
    choose, texts = random.Random(31), [text for pair in PAIRS for text in pair[:2]]
    pieces = [piece for text in texts for piece in re.findall(r"\\[A-Za-z]+|\\.|\d+|.", text)]
    for _ in range(3000):
        text, other = choose.choice(texts), choose.choice(texts)
        position = choose.randrange(len(text) + 1)
        answer = text[:position] + choose.choice(pieces) + text[position + choose.randrange(3) :]
        if choose.random() < 0.5:
            answer = "".join(choose.choice(pieces) for _ in range(choose.randrange(1, 14)))
        for gold in (other, text, answer + " "):
            assert verdict(answer, gold).correct is verdict(gold, answer).correct, (answer, gold)
        assert verdict(answer, answer + " ").correct or not answer.strip()


COSTLY = [
    *(answer for answer, _, _ in GROUPS["field"]),
    "{" * 100_000,
    "\\boxed{" * 10_000 + "1" + "}" * 10_000,
    "\\frac{" * 600 + "1",
    "(" * 1000 + "1" + ")" * 1000,
    "-" * 3000 + "1",
    "|" * 1000,
    "x^" * 700 + "x",
    "1+" * 700 + "1",
    "9" * 3900,
    "9" * 100_000,
    "1e99999",
    "1e999999999999",
    "(10^{10^{5}})!",
    "((((9!)!)!)!)!",
    "\\binom{10^{50}}{10^{49}}",
    "\\binom{10^9+0.5}{10^8}",
    "\\sin(10^{10^6})",
    "\\lfloor \\pi \\cdot 10^{1000} \\rfloor",
    "0.5^{0.5^{0.5^{0.5}}}!" * 40,
    "\\sqrt[999]{" + "7" * 900 + "}",
    "2^{" * 30 + "2" + "}" * 30,
    "1/3," * 300 + "1",
    "\\pm 1" * 300,
    "\\pm (" * 30 + "1" + ")" * 30,
    "(x+y)^{100000}",
    "\\cos(" * 35 + "x" + ")" * 35,
    "\\text{" * 500,
    "a " * 1900,
    ", " * 1900,
    "=" * 1900,
    "1 " * 1900,
    ",".join(f"x_{{{n}}}" for n in range(300)),
]


@pytest.mark.parametrize("gold", ["1", "x^2+1", ",".join(f"x_{{{n}}}+1" for n in range(300))])
def test_no_answer_takes_long_to_judge(gold):
    slow = []
    for answer in COSTLY:
        began = time.process_time()
        verdict(answer, gold)
        verdict(gold, answer)
        if (taken := time.process_time() - began) > LIMIT_S:
            slow.append((answer[:60], taken))
    assert not slow


def test_a_comparison_on_which_math_verify_hangs_ends_at_the_limit():
    module.math_verify_equal("1", "1", 60.0)  # its import takes seconds
    began = time.monotonic()
    given = verdict(r"\sum_{k=1}^{10^9} \sin(k^k)", "2", MathOptions(limit_s=0.5))
    assert given.reason == "math-verify took more than 0.5 s" and not given.correct
    assert 0.5 <= time.monotonic() - began < 10


def test_math_verify_is_not_used_if_the_caller_disables_it(monkeypatch):
    monkeypatch.setattr(module, "math_verify_equal", lambda *_: pytest.fail("asked"))
    total = r"\sum_{k=1}^{10} k"
    assert not verdict(total, "55", ask_math_verify=False).correct and not verdict("(B) " + total, "55", ask_math_verify=False).correct
    assert verdict(total, total + " ", ask_math_verify=False).correct and verdict("1/2", "0.5", ask_math_verify=False).correct


HOSTILE = [
    "__import__('os').system('touch {file}')",
    "\\text{{__import__('os').system('touch {file}')}}",
    "\\operatorname{{__import__('os').system('touch {file}')}}(1)",
    "\\sum_{{k=1}}^{{2}} \\operatorname{{exec}}(k)",
    "\\sum_{{__import__('os')}}^{{2}} k",
    "\\int_0^1 \\mathrm{{eval}}(x) dx",
    "\\lim_{{x \\to 0}} \\text{{open('{file}','w')}}",
    "(lambda: open('{file}', 'w'))()",
    "exec(\"open('{file}','w')\")",
    "Integer(1).__class__",
    "\\sum_{{k=1}}^{{3}} x_{{__class__}}",
    "\\prod_{{k=1}}^{{3}} f'(k)",
    "\\sum_{{k=1}}^{{2}} 0x10",
    "\\int 1e1__import__('os') dx",
    "\\sum_{{k=1}}^{{2}} 1_0k",
    "\\overline{{[x for x in (1,)]}}",
    "1 if open('{file}','w') else 2",
]


def test_no_text_is_ever_compiled_or_evaluated(tmp_path):
    """Runs in a process that reports every compilation of text, also in the processes that it forks."""
    file, log = tmp_path / "made", tmp_path / "compiled"
    answers = [text.format(file=file) for text in HOSTILE] + [pair[0] for pair in PAIRS] + [pair[0] for pair in ELSEWHERE]
    script = f"""
        import os, sys
        from megatron_aspo.rewards.math.forked import math_verify_equal
        from megatron_aspo.rewards.math.options import MathOptions
        from megatron_aspo.rewards.math.verdict import verdict
        math_verify_equal("1", "1", 5.0)
        log = os.open({str(log)!r}, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        def report(event, arguments):
            if event == "compile" and arguments[0] is not None and str(arguments[1]).startswith("<"):
                os.write(log, repr(arguments[0])[:200].encode() + b"\\n")
            elif event in ("os.system", "subprocess.Popen", "os.exec"):
                os.write(log, event.encode() + b"\\n")
        sys.addaudithook(report)
        for answer in {answers!r}:
            verdict(answer, "7", MathOptions(limit_s=1.0))
        for answer in {answers[: len(HOSTILE)]!r}:
            math_verify_equal(answer, "7", 1.0)
            math_verify_equal("7", answer, 1.0)
        os.write(log, b"end\\n")
        eval("1 + 1")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, check=True, timeout=120)
    assert log.read_text().splitlines() == ["end", "b'1 + 1'"]
    assert not file.exists()


def test_decimals_are_exact_if_the_option_requires_it():
    assert verdict("0.333333", "1/3").correct
    assert not verdict("0.333333", "1/3", MathOptions(rounded_digits=0)).correct
    assert verdict("33.3", "100/3", MathOptions(rounded_digits=3)).correct


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extract": "box"}, "data.math.extract=box is not known; did you mean boxed?"),
        ({"limit_s": 0}, "data.math.limit_s=0.0 must be greater than 0"),
        ({"rounded_digits": -1}, "data.math.rounded_digits=-1 must be 0, for exact values alone, or more; raise it"),
    ],
)
def test_options_out_of_bounds_are_named(options, message):
    with pytest.raises(UserError) as error:
        MathOptions(**options)
    assert str(error.value) == message
