"""The verdict on an answer: comparison of two texts, with a reason.

The two are compared first as text, then exactly, as formulas that this package's parser reads (`compare.py`); that result is final. Only
for a notation that the parser cannot read, such as an integral, math-verify decides, in a process that is killed at its limit
(`forked.py`).

Units are ignored if only one side has one, and converted if both have one of a kind; else the answers differ. `50%` is 0.5, and 50 if the
other side has no percent sign; `30°` is 30, and π/6. A number with its base as a subscript also equals its digits without the base.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_aspo.rewards.math.compare import Comparison
from megatron_aspo.rewards.math.forked import math_verify_equal
from megatron_aspo.rewards.math.notation import BRACKETED, FUNCTIONS, clean
from megatron_aspo.rewards.math.options import MathOptions
from megatron_aspo.rewards.math.parser import parse
from megatron_aspo.rewards.math.tokens import MAX_CHARACTERS
from megatron_aspo.rewards.math.tree import Node, Unreadable, number
from megatron_aspo.rewards.math.units import Unit, split_unit

_MAX_TEXT = 1 << 20
"""Number of characters above which nothing is compared."""
_WRAPPED = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mbox|textnormal|operatorname|mathbf|mathsf)\s*\{([^{}]*)\}")
_CHOICE = re.compile(r"\(?([A-Za-z])[).:]?")
_WORDS = re.compile(r"[A-Za-zÀ-ÿ][A-Za-zÀ-ÿ' ,.()-]*")
_LABELLED = re.compile(r"(?:\\text(?:bf|rm)? ?\{ ?)?\(([A-J])\) ?\}? ?(\S.*)")
"""A choice with its letter: `(B) 5`, `\\textbf{(B)} 5`, `\\text{(B) }5`."""
_FORMULA = re.compile(rf"[A-Za-z]?(?:(?:{'|'.join((*FUNCTIONS, *BRACKETED, 'infinity', 'infty', 'pi'))})[A-Za-z]{{0,2}})+")
"""A word made of function names, each followed by up to two letters, such as sinx and xlnx, but not single."""
_SET_BUILDER = re.compile(r"\\\{ ?([A-Za-z])(?: ?\\in ?\\mathbb\{R\})? ?[|:] ?(.*)\\\}")
_BLANKS = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
"""Blanks that are not between two digits: 1 1/2 is not 11/2."""
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")
_SPACED_THOUSANDS = re.compile(r"[-+]?\d{1,3}( \d{3})+(\.\d+)?")


@dataclass(frozen=True)
class Verdict:
    correct: bool
    reason: str
    """A short explanation for a reader; never contains the gold answer."""


@dataclass(frozen=True)
class Reading:
    """One interpretation of an answer."""

    node: Node
    unit: Unit | None = None
    percent: bool = False


def verdict(answer: str, gold: str, options: MathOptions | None = None, ask_math_verify: bool = True) -> Verdict:
    """Compare an answer, as returned by `extract_answer`, with the gold answer or another answer. Symmetric in the two.

    Takes at most a second, plus `options.limit_s` if math-verify is used, which forks this process: only processes without other threads
    should do that. With ask_math_verify=False, notations that are not read here are compared as text.
    """
    options = options or MathOptions()
    if max(len(answer), len(gold)) > _MAX_TEXT:
        return Verdict(False, f"longer than {_MAX_TEXT} characters")
    if answer.strip() == gold.strip() and answer.strip():
        return Verdict(True, "the same text")
    if max(len(answer), len(gold)) > MAX_CHARACTERS:
        return Verdict(False, f"longer than {MAX_CHARACTERS} characters, and another text")
    texts = clean(answer), clean(gold)
    if not all(texts):
        return Verdict(False, "empty")
    if is_same_text(*texts):
        return Verdict(True, "the same text")
    labels = [_LABELLED.fullmatch(text) for text in texts]
    if any(labels):
        return _compare_labelled(texts, labels, options, ask_math_verify)
    if any(is_words(text) for text in texts):
        return Verdict(False, "another text")
    try:
        readings = [readings_of(text) for text in texts]
    except Unreadable as error:
        if not error.known_elsewhere:
            return Verdict(False, f"not readable: {error}")
        if not ask_math_verify:
            return Verdict(False, "another text, in a notation that is not read here")
        return Verdict(*math_verify_equal(*texts, options.limit_s))
    except RecursionError:
        return Verdict(False, "not readable: nested too deeply")
    comparison = Comparison(options.rounded_digits)
    try:
        equal = any(_equal(a, b, comparison) for a in readings[0] for b in readings[1])
    except RecursionError:
        return Verdict(False, "nested too deeply to be compared")
    return Verdict(equal, "equal" if equal else "different")


def _compare_labelled(texts: tuple[str, str], labels: list[re.Match | None], options: MathOptions, ask: bool) -> Verdict:
    """Compare choices with letters: by the letters if both sides have one, else by the text after them."""
    letters = [label[1] if label else _choice_letter(text) for text, label in zip(texts, labels, strict=True)]
    if all(letters):
        return Verdict(letters[0] == letters[1], "the letters of the choices")
    answer, gold = (label[2] if label else text for text, label in zip(texts, labels, strict=True))
    return verdict(answer, gold, options, ask)


def _choice_letter(text: str) -> str:
    choice = _CHOICE.fullmatch(_WRAPPED.sub(r"\1", text).strip())
    return choice[1].upper() if choice else ""


def is_same_text(a: str, b: str) -> bool:
    """Return whether two cleaned texts agree up to insignificant blanks; words and the letter of a choice in either case."""
    plain = [_WRAPPED.sub(r"\1", text).strip() for text in (a, b)]
    if _BLANKS.sub("", plain[0]) == _BLANKS.sub("", plain[1]):
        return True
    first, second = (_CHOICE.fullmatch(text) for text in plain)
    if first and second:
        marked = any("(" in text or ")" in text for text in plain) or is_words(a) or is_words(b)
        return marked and first[1].upper() == second[1].upper()
    return all(_WORDS.fullmatch(text) for text in plain) and _fold_case(plain[0]) == _fold_case(plain[1])


def _fold_case(text: str) -> str:
    return re.sub(r"[\s().,]+", " ", text).strip().casefold()


def is_words(text: str) -> bool:
    """Return whether a cleaned text is words, not a formula: without signs, with a word of four letters, or of two in `\\text{}`."""
    plain = _WRAPPED.sub(r"\1", text).strip()
    if not _WORDS.fullmatch(plain):
        return False
    least = 2 if plain != text else 4
    return any(len(word) >= least and not _FORMULA.fullmatch(word) for word in re.findall(r"[A-Za-zÀ-ÿ]+", plain))


def readings_of(text: str) -> list[Reading]:
    """Return the interpretations of a cleaned text. Raises Unreadable if there is none."""
    if builder := _SET_BUILDER.fullmatch(text):
        text = builder[2]
    bare, unit = split_unit(text)
    try:
        return _readings(bare, unit)
    except Unreadable:
        if bare == text:
            raise
        return _readings(text, None)


def _readings(text: str, unit: Unit | None) -> list[Reading]:
    if _THOUSANDS.fullmatch(text):
        return [Reading(parse(text.replace(",", "")), unit), Reading(parse(text), unit)]
    if _SPACED_THOUSANDS.fullmatch(text):
        text = text.replace(" ", "")
    node = parse(text)
    readings = [Reading(node, unit)]
    if node.op == "degree":
        return [Reading(node.args[0], Unit("angle", Fraction(1))), Reading(node)]
    if node.op == "relation" and "~" in node.value:
        return [Reading(part, unit) for part in _exact_and_rounded(node)]
    if node.op == "relation" and node.args[-1].op == "degree":
        bare = Node("relation", (*node.args[:-1], node.args[-1].args[0]), node.value)
        return [Reading(bare, Unit("angle", Fraction(1))), Reading(node)]
    if node.op == "based":
        readings.append(Reading(number(int(node.value[0])), Unit(f"base {node.value[1]}", Fraction(1))))
    if node.op == "div" and node.args[1] == number(100) and text.endswith("%"):
        return [Reading(node.args[0], unit, percent=True)]
    return readings


def _exact_and_rounded(node: Node) -> tuple[Node, Node]:
    """Split x = 1/3 ≈ 0.33 into x = 1/3 and x = 0.33."""
    first = node.value.index("~")
    exact = Node("relation", node.args[: first + 1], node.value[:first]) if first else node.args[0]
    return exact, Node("relation", (node.args[0], node.args[-1]), ("=",)) if node.args[0].symbols() else node.args[-1]


def _equal(a: Reading, b: Reading, comparison: Comparison) -> bool:
    x, y = a.node, b.node
    if a.unit and b.unit:
        if a.unit.kind != b.unit.kind:
            return False
        if a.unit.factor != b.unit.factor:
            x, y = _scaled(x, a.unit.factor), _scaled(y, b.unit.factor)
    if "based" in (x.op, y.op) and x != y:
        return False  # its value in another base is a different answer
    if a.percent != b.percent and comparison.equal(*(Node("div", (r.node, number(100))) if r.percent else r.node for r in (a, b))):
        return True
    return comparison.equal(x, y)


def _scaled(node: Node, factor: Fraction) -> Node:
    return Node("mul", (node, number(factor)))
