"""Normalisation of notation: LaTeX, plain text and Unicode signs are mapped to the few forms that the parser reads."""

import re
import unicodedata

FUNCTIONS = (
    "arcsinh", "arccosh", "arctanh", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "coth", "sin", "cos", "tan", "cot", "sec", "csc",
    "exp", "ln", "lg", "log",
)  # fmt: skip
"""Functions of one argument that may be written without brackets; log is the natural logarithm, lg is that to base 10."""
BRACKETED = ("sqrt", "cbrt", "abs", "floor", "ceil", "gcd", "lcm", "max", "min")
"""Functions whose arguments are in brackets."""
_SIGNS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "∞": r"\infty ", "π": r"\pi ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ", "°": r"^\circ ", "√": r"\sqrt",
    "≈": r"\approx ", "…": r"\ldots ", "∅": r"\emptyset ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ",
    "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "ℝ": r"\mathbb{R}",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "，": ",", "；": ";", "∖": r"\setminus ",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SYNONYMS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "leq": "le", "geq": "ge", "leqslant": "le",
    "geqslant": "ge", "neq": "ne", "lt": "<", "gt": ">", "dots": "ldots", "cdots": "ldots", "dotsc": "ldots", "varnothing": "emptyset",
    "ast": "times", "div": "/", "degree": "^\\circ", "lvert": "|", "rvert": "|", "vert": "|", "lbrace": "\\{", "rbrace": "\\}",
    "lor": "\\text{ or }", "lbrack": "[", "rbrack": "]", "land": "\\text{ and }", "infin": "infty", "backslash": "setminus",
    "thickspace": " ", "colon": ":", "mid": "|", "varphi": "phi", "varepsilon": "epsilon", "to": "rightarrow", "simeq": "approx",
    "bold": "mathbf", "boldsymbol": "mathbf", "mathit": "mathbf", "bf": "", "rm": "", "it": "",
}  # fmt: skip
_DROPPED = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr|biggl|biggr|big|Big|bigg|Bigg|middle|displaystyle|textstyle|limits|nolimits|hfill)(?![A-Za-z])\.?"
)
_SPACES = re.compile(r"(?P<row>\\\\(?=\s*\S))|\\[,;:!> \n\t]|\\(?:quad|qquad|space|hspace\{[^{}]*\}|enspace)(?![A-Za-z])|~|\s+|\\\\")
_GROUPED = re.compile(r"(?<=\d)(?:\{,\}|\\[,!;: ]|\\,)(?=\d{3}(?!\d))")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\overline\s*\{?(\d+)\}?")
_REWRITTEN = [
    (re.compile(r"\\mathbb\s*([A-Z])(?![A-Za-z])"), r"\\mathbb{\1}"),
    (re.compile(r"\\not\s*="), r"\\ne "),
    (re.compile(r"\s*\^\s*(?:\\prime(?![A-Za-z])|\{\s*\\prime\s*\})"), "'"),
    (re.compile(r"(?<=\d)\s*\^?\s*\{?\s*(?:\\(?:text|mathrm|textrm)\s*\{\s*)?(?:st|nd|rd|th)\b\s*\}?\s*\}?$"), ""),
    (re.compile(r"(?<=\.\d)(\d*)\s*(?:\\[lc]?dots|\.\.\.+|…)$"), r"\1"),
    (re.compile(r"^\s*(?:\\approx|\\sim|≈|~)\s*"), ""),
]
"""Alternative forms of known notation: ℝ without braces, ≠, primes, ordinals, an ellipsis after a decimal, "about"."""
_MULTIPLES = {"dozen": "12", "hundred": "10^{2}", "thousand": "10^{3}", "million": "10^{6}", "billion": "10^{9}", "trillion": "10^{12}"}
_MULTIPLE = re.compile(rf"(?<=\d)\s*(?:\\(?:text|mathrm|textrm)\s*\{{\s*)?({'|'.join(_MULTIPLES)})s?\b(?:\s*\}})?")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}", re.DOTALL)


def clean(text: str) -> str:
    """Return the formula in plain signs: without delimiters, box, bracket sizes, spacing commands and final full stop."""
    text = _unwrap(unicodedata.normalize("NFC", text).strip())
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda found: "^{" + found[0].translate(_SUPERSCRIPTS) + "}", text)
    text = "".join(_SIGNS.get(sign, sign) for sign in text)
    for pattern, new in _REWRITTEN:
        text = pattern.sub(new, text)
    text = _MULTIPLE.sub(
        lambda found: r"\cdot " + _MULTIPLES[found[1]] + ("" if found[0].endswith("}") or "{" not in found[0] else r"\text{"), text
    )
    text = _REPEATING.sub(_repeating_decimal, _GROUPED.sub("", text))
    text = _DROPPED.sub("", text)
    text = _COMMAND.sub(_canonical_command, text)
    text = _SPACES.sub(lambda found: found["row"] or " ", text)
    text = text.replace("**", "^").replace("\\%", "%").replace("\\#", "#").replace("\\&", "&")
    text = text.replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ").replace("==", "=").replace("...", r"\ldots ")
    return re.sub(r" +", " ", _unwrap(text)).strip()


def _unwrap(text: str) -> str:
    """Remove whatever only surrounds the formula."""
    for _ in range(4):
        before = text
        text = text.strip().rstrip("。") if text.endswith("。") else text.strip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        for left, right in _DELIMITERS:
            inner = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right) and left not in inner:
                text = inner
        if (box := _BOX.fullmatch(text)) and _closes_at_end(box[1]):
            text = box[1]
        if text == before:
            break
    return text


def _closes_at_end(inner: str) -> bool:
    """Return whether no brace in `inner` closes one outside of it."""
    depth = 0
    for sign in re.findall(r"\\.|[{}]", inner):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if depth < 0:
            return False
    return depth == 0


def _repeating_decimal(found: re.Match) -> str:
    """Return a decimal with repeating digits as a fraction."""
    whole, once, again = found[1], found[2], found[3]
    if len(whole + once + again) > 100:
        return found[0]
    above = int(whole + once + again) - int(whole + once or "0")
    return f"\\frac{{{above}}}{{{'9' * len(again)}{'0' * len(once)}}}"


def _canonical_command(found: re.Match) -> str:
    name = found[1]
    other = _SYNONYMS.get(name)
    if other is None:
        return found[0]
    return "\\" + other if other.isalpha() else other
