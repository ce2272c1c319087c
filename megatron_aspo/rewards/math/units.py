"""Units at the end of an answer: lengths, times, money, degrees, a modulus, and the nouns of a question (`5 \\text{ apples}`)."""

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_aspo.rewards.math.notation import BRACKETED, FUNCTIONS

_TABLE = {
    "length": {"mm millimeter millimetre": "1/1000", "cm centimeter centimetre": "1/100", "dm": "1/10", "m meter metre": "1",
               "km kilometer kilometre": "1000", "in inch inches": "0.0254", "ft foot feet": "0.3048", "yd yard": "0.9144",
               "mi mile": "1609.344"},
    "time": {"ms": "1/1000", "s sec second": "1", "min minute": "60", "h hr hour": "3600", "day": "86400", "week": "604800"},
    "mass": {"mg": "1/1000", "g gram": "1", "kg kilogram": "1000", "lb pound": "453.59237", "oz ounce": "28.349523125"},
    "volume": {"ml mL": "1", "l L liter litre": "1000"},
    "money": {"dollar $ USD": "1", "cent": "1/100"},
    "angle": {"degree deg": "1"},
    "euro": {"euro €": "1"},
}  # fmt: skip
_UNITS = {name: (kind, Fraction(factor)) for kind, rows in _TABLE.items() for names, factor in rows.items() for name in names.split()}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWER = r"(?:\s*\^\s*\{?\s*([23])\s*\}?)?$"
_WRAPPED = re.compile(
    r"\\(?:text|textrm|textbf|mathrm|mbox|operatorname|textnormal)\s*\{\s*([A-Za-z][A-Za-z ./]*?(?:\^[23])?)\.?\s*\}" + _POWER
)
_PLAIN = re.compile(r"(?<=[\d)}\]!]) ([A-Za-z]{2,}(?:[ /][A-Za-z]+)*)\.?" + _POWER)
_GLUED = re.compile(r"(?<=\d)(mm|cm|dm|km|kg|mg|ml|mL|ft|lb|min)" + _POWER)
_MODULUS = re.compile(r" *\(?\\?p?mod *\{? *(\d{1,40}) *\}?\)?$")
_MONEY = re.compile(r"^(-?)\s*(?:\\\$|\$|€|USD )\s*(?=[\d.\\])")
_NEVER = {"and", "or", "if", "mod", "is", "to", "for", "when", "where", "pi", "times", "inf", "infinity", "choose", *FUNCTIONS, *BRACKETED}
_LONGEST = 60
"""Number of last characters that are searched for a unit."""


@dataclass(frozen=True)
class Unit:
    kind: str
    """The quantity it measures; for a noun, the noun itself."""
    factor: Fraction
    """Its size in the first unit of its kind."""
    known: bool = True
    """Whether it is in the table."""


def split_unit(text: str) -> tuple[str, Unit | None]:
    """Return a cleaned text without its unit, and the unit. A word is a unit only after a number or a closing bracket.

    Single letters are variables unless they are in `\\text{}`; a word glued to its number is a unit only if it is a symbol such as `cm`.
    """
    if money := _MONEY.match(text):
        return money[1] + text[money.end() :], Unit("money" if "€" not in money[0] else "euro", Fraction(1))
    if (modulus := _MODULUS.search(text)) and modulus.start():
        return text[: modulus.start()], Unit("mod " + modulus[1], Fraction(1))
    head, tail = text[:-_LONGEST], text[-_LONGEST:]
    for pattern in (_WRAPPED, _PLAIN, _GLUED):
        if (found := pattern.search(tail)) and (unit := _unit(found[1], found[2])):
            before = (head + tail[: found.start()]).strip()
            short = pattern is _PLAIN and max(map(len, re.split(r"[ /]", found[1]))) < 3 and not unit.known
            if before and not short and (before[-1] in ")]}!" or before[-1].isdigit() or (pattern is _WRAPPED and before[-1].isalpha())):
                return before, unit
    return text, None


def _unit(words: str, power: str | None) -> Unit | None:
    """Return the unit that words name: one of the table, a quotient of two, or a noun."""
    parts = [part for part in re.split(r"\s*/\s*|\s+per\s+", words.strip()) if part]
    if not parts or any(word.lower() in _NEVER for word in words.split()):
        return None
    kind, factor, known = "", Fraction(1), True
    for position, part in enumerate(parts):
        part, caret, inner = part.partition("^")
        power = inner if caret else power
        name = part.split()
        exponent = int(power) if power and position == len(parts) - 1 else 1
        if name[0].lower() in _POWERS and len(name) > 1:
            exponent, name = _POWERS[name[0].lower()], name[1:]
        elif name[-1].lower() in ("squared", "cubed") and len(name) > 1:
            exponent, name = (2 if name[-1].lower() == "squared" else 3), name[:-1]
        one = " ".join(name)
        found = _UNITS.get(one) or _UNITS.get(one.lower()) or _UNITS.get(_singular(one.lower()))
        known = known and found is not None
        found = found or (_singular(one.lower()), Fraction(1))
        kind += ("/" if position else "") + found[0] + (str(exponent) if exponent > 1 else "")
        factor = factor * found[1] ** exponent if position == 0 else factor / found[1] ** exponent
    return Unit(kind, factor, known)


def _singular(word: str) -> str:
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 2 else word
