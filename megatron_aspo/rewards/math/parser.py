"""A recursive-descent parser of formulas, LaTeX or plain. It builds trees and computes nothing.

From loose to tight: lists (`,` `;` and, or), unions, relations, sums, products (a missing sign is one too, and `/` binds as `·` does, from
left to right), signs, powers and `!`. An integer before a fraction of integers below 1 is a mixed number.
"""

from fractions import Fraction

from megatron_aspo.rewards.math.notation import BRACKETED, FUNCTIONS
from megatron_aspo.rewards.math.tokens import Token, tokenize
from megatron_aspo.rewards.math.tree import INFINITY, Node, Unreadable, negative, number

_STARTS = {"(", "[", "{", "\\{", "frac", "sqrt", "binom", "langle", "lfloor", "lceil", "pi", "infty", "imath", "begin", "mathbf"}
"""Signs and commands that begin a factor."""
_MAX_DEPTH = 40
_MAX_EXPONENT = 100_000
"""Largest exponent of ten in a number such as 1e5."""
_RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "<=", "ge": ">=", "ne": "!=", "approx": "~", "equiv": "=", "in": "in"}
_SUM_SIGNS = {"+": "add", "-": "sub", "pm": "pm", "mp": "mp"}
_CLOSING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "langle": "rangle", "lfloor": "rfloor", "lceil": "rceil", "|": "|"}
_GREEK = """
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega ell hbar
    Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega
""".split()  # noqa: SIM905
_ELSEWHERE = """
    sum prod int iint oint lim limsup liminf end overline bar vec hat mathbf det operatorname partial nabla bmod mod sup inf arg Re Im dot
    prime forall exists neg cap subset subseteq overbrace underbrace stackrel overset underset oplus otimes circ rightarrow Rightarrow
    implies iff angle triangle perp parallel cong sim propto notin
""".split()  # noqa: SIM905
"""Commands that are mathematics, and not read here."""


def parse(text: str) -> Node:
    """Return the tree of a cleaned text. Raises Unreadable."""
    parser = _Parser(text)
    node = parser.listed()
    parser.expect_end()
    return node


class _Parser:
    def __init__(self, text: str):
        self._text, self._tokens, self._position, self._depth, self._bars = text, tokenize(text), 0, 0, 0

    # tokens

    @property
    def _token(self) -> Token:
        return self._tokens[self._position]

    def _is(self, *texts: str) -> bool:
        token = self._token
        return token.kind in ("sign", "command") and token.text in texts

    def _take(self, *texts: str) -> bool:
        if self._is(*texts):
            self._position += 1
            return True
        return False

    def _next(self) -> Token:
        token = self._token
        self._position += token.kind != "end"
        return token

    def _require(self, text: str) -> None:
        if not self._take(text):
            raise Unreadable(f"{text} is missing")

    def expect_end(self) -> None:
        if self._token.kind != "end":
            raise self._unreadable(self._token)

    def _unreadable(self, token: Token) -> Unreadable:
        known = token.kind == "command" and token.text in _ELSEWHERE
        return Unreadable(f"{token.text!r} is not read here" if token.text else "it ends too early", known_elsewhere=known)

    # collections

    def listed(self) -> Node:
        """Elements separated at the outermost level; one alone is itself."""
        elements, joints = [self._element()], set()
        while joint := self._joint():
            joints.add(joint)
            elements.append(self._element())
        if len(elements) == 1:
            return elements[0]
        if joints == {"or"} and all(element.op in ("relation", "member") and element.value != ("=",) for element in elements):
            return Node("union", tuple(elements))
        return Node("list", tuple(elements))

    def _joint(self) -> str:
        """Take a separator; returns what it says, empty if there is none."""
        joint = ""
        if self._take(",", ";"):
            joint = ","
        token = self._token
        if token.kind == "text" and token.text in ("and", "or", ", and", ", or"):
            self._position += 1
            return token.text.split()[-1]
        for word in ("and", "or"):
            letters = self._tokens[self._position : self._position + len(word)]
            if "".join(letter.text for letter in letters) == word and letters[0].spaced and not any(one.spaced for one in letters[1:]):
                self._position += len(word)
                return word
        return joint

    def _element(self) -> Node:
        """A set of sets, or a relation."""
        node = self._relation()
        while True:
            if self._take("cup"):
                node = Node("union", (*(node.args if node.op == "union" else (node,)), self._relation()))
            elif self._take("setminus"):
                node = Node("minus", (node, self._relation()))
            else:
                return node

    def _relation(self) -> Node:
        parts, signs = [self._sum()], []
        while self._token.kind in ("sign", "command") and self._token.text in _RELATIONS:
            signs.append(_RELATIONS[self._next().text])
            parts.append(self._element() if signs[-1] == "in" else self._sum())
        if not signs:
            return parts[0]
        if "in" in signs:
            if len(signs) > 1:
                raise Unreadable("a chain with ∈")
            return Node("member", tuple(parts))
        return Node("relation", tuple(parts), tuple(signs))

    # arithmetic

    def _sum(self) -> Node:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Unreadable(f"nested more than {_MAX_DEPTH} deep")
        terms = [self._signed()]
        while self._token.kind in ("sign", "command") and (kind := _SUM_SIGNS.get(self._token.text)):
            self._position += 1
            term = self._product()
            if kind in ("pm", "mp"):
                terms = [Node("pm", (_added(terms), term), 1 if kind == "pm" else -1)]
            else:
                terms.append(negative(term) if kind == "sub" else term)
        self._depth -= 1
        return _added(terms)

    def _signed(self) -> Node:
        if self._take("-"):
            return negative(self._signed_product())
        if self._take("+"):
            return self._signed_product()
        if self._is("pm", "mp"):
            sign = 1 if self._next().text == "pm" else -1
            return Node("pm", (number(0), self._product()), sign)
        return self._product()

    def _signed_product(self) -> Node:
        return negative(self._product()) if self._take("-") else self._product()

    def _product(self) -> Node:
        node = self._power()
        while True:
            if self._take("times", "cdot", "*"):
                node = Node("mul", (node, self._factor_after_sign()))
            elif self._take("/"):
                node = Node("div", (node, self._factor_after_sign()))
            elif self._starts_factor():
                node = self._joined(node)
            else:
                return node

    def _factor_after_sign(self) -> Node:
        if self._take("-"):
            return negative(self._power())
        self._take("+")
        return self._power()

    def _starts_factor(self) -> bool:
        token = self._token
        if token.kind in ("sign", "command"):
            if token.text == "|":
                return not self._bars
            return token.text in _STARTS or (token.kind == "command" and (token.text in _GREEK or token.text in (*FUNCTIONS, *BRACKETED)))
        if token.kind in ("letter", "name"):
            return not self._starts_joint()
        return token.kind == "number"

    def _starts_joint(self) -> bool:
        before = self._position
        found = self._token.spaced and bool(self._joint())
        self._position = before
        return found

    def _joined(self, node: Node) -> Node:
        """A product without a sign, or a mixed number."""
        is_number, begun = self._token.kind == "number", self._position
        factor = self._power()
        whole = node.args[0] if node.op == "neg" else node
        if whole.op == "number" and whole.value.denominator == 1 and self._tokens[begun - 1].kind == "number":
            if factor.op == "div" and all(part.op == "number" for part in factor.args):
                if 0 < factor.args[0].value < factor.args[1].value:
                    return Node("add", (node, factor))
            elif is_number and factor.op == "number" and self._is("/"):
                self._position += 1
                below = self._power()
                if below.op == "number" and factor.value < below.value:
                    return Node("add", (node, Node("div", (factor, below))))
                raise Unreadable("two numbers side by side")
        if is_number and self._tokens[begun - 1].kind == "number":
            raise Unreadable("two numbers side by side")
        return Node("mul", (node, factor))

    def _power(self) -> Node:
        node = self._atom()
        while True:
            if self._take("!"):
                node = Node("factorial", (node,))
            elif self._take("%"):
                node = Node("div", (node, number(100)))
            elif self._take("^"):
                circle = self._take("circ") or self._take_group("circ")
                node = Node("degree", (node,)) if circle else Node("pow", (node, self._exponent()))
            else:
                return node

    def _take_group(self, command: str) -> bool:
        """Take `{\\command}` if that stands here."""
        tokens = self._tokens[self._position : self._position + 3]
        if [token.text for token in tokens] == ["{", command, "}"]:
            self._position += 3
            return True
        return False

    def _exponent(self) -> Node:
        if self._take("-"):
            return negative(self._exponent())
        if self._take("{"):
            return self._until("}")
        node = self._atom()
        return Node("pow", (node, self._exponent())) if self._take("^") else node

    # atoms

    def _until(self, closing: str) -> Node:
        bars, self._bars = self._bars, 0
        node = self._sum()
        self._bars = bars
        self._require(closing)
        return node

    def _atom(self) -> Node:
        token = self._next()
        if token.kind == "number":
            return self._subscripted_number(token)
        if token.kind == "letter":
            return self._letter(token)
        if token.kind == "named_set":
            return Node("named_set", value=token.text)
        if token.kind == "name":
            return self._name(token.text)
        if token.kind == "sign":
            return self._bracketed(token)
        if token.kind == "command":
            return self._command(token)
        raise self._unreadable(token)

    def _subscripted_number(self, token: Token) -> Node:
        if self._is("_"):
            self._position += 1
            base = self._subscript()
            if not base.isdigit() or not token.text.isdigit() or not max(1, *map(int, token.text)) < int(base[:3]) <= 36:
                raise Unreadable("a number with a subscript that is no base")
            return Node("based", value=(token.text, int(base)))
        return read_number(token.text)

    def _subscript(self) -> str:
        """The text of a subscript, without blanks."""
        if not self._take("{"):
            return self._next().text
        parts, depth = [], 1
        while depth:
            token = self._next()
            if token.kind == "end":
                raise Unreadable("} is missing")
            depth += {"{": 1, "}": -1}.get(token.text, 0) if token.kind == "sign" else 0
            parts.append(token.text if depth else "")
        return "".join(parts)

    def _letter(self, token: Token) -> Node:
        if token.text in "ei" and not self._is("_"):
            return Node("constant", value=token.text)
        name = token.text
        if self._take("_"):
            name += "_" + self._subscript()
        if name[0] in "fg" and self._is("(") and not self._token.spaced:
            self._position += 1
            return Node("function", (self._until(")"),), name)
        return Node("symbol", value=name)

    def _name(self, name: str) -> Node:
        if name == "pi":
            return Node("constant", value="pi")
        if name in ("infinity", "infty", "inf", "oo"):
            return INFINITY
        return self._call(name)

    def _call(self, name: str) -> Node:
        """A function with its argument, which without brackets is the product up to the next sign or function."""
        if name in BRACKETED:
            if name == "sqrt" and not self._is("(", "{"):
                return Node("root", (self._atom(), number(2)))
            opening = self._next().text
            if opening not in ("(", "{"):
                raise Unreadable(f"{name} without brackets")
            arguments = [self._until_separator()]
            while self._take(","):
                arguments.append(self._until_separator())
            self._require(_CLOSING[opening])
            if name in ("sqrt", "cbrt"):
                return Node("root", (arguments[0], number(2 if name == "sqrt" else 3)))
            return Node("call", tuple(arguments), name)
        base = None
        if self._take("_"):
            base = self._group()
        exponent = self._exponent() if self._take("^") else None
        node = Node("call", (self._argument(),), name)
        if base is not None:
            if name != "log":
                raise Unreadable(f"a subscript of {name}")
            node = Node("div", (node, Node("call", (base,), "log")))
        if exponent == negative(number(1)) and name not in ("ln", "log", "lg", "exp"):
            return Node("call", node.args, "arc" + name)
        return Node("pow", (node, exponent)) if exponent is not None else node

    def _until_separator(self) -> Node:
        bars, self._bars = self._bars, 0
        node = self._sum()
        self._bars = bars
        return node

    def _argument(self) -> Node:
        if self._is("(", "{"):
            return self._power_without_sign()
        node = self._power()
        while self._starts_factor() and not (self._token.kind == "name" or self._token.text in FUNCTIONS) and not self._is("("):
            node = Node("mul", (node, self._power()))
        return node

    def _power_without_sign(self) -> Node:
        """A bracketed argument: a power behind it is one of the function's value."""
        closing = _CLOSING[self._next().text]
        return self._until(closing)

    def _group(self) -> Node:
        """The argument of a command: a group, or one digit, letter or command."""
        if self._take("{"):
            return self._until("}")
        token = self._token
        if token.kind == "number" and len(token.text) > 1 and token.text.isdigit():
            self._tokens[self._position] = Token("number", token.text[1:], token.start + 1)
            return number(int(token.text[0]))
        return self._atom()

    def _bracketed(self, token: Token) -> Node:
        if token.text in "([":
            return self._collection(token.text)
        if token.text == "{":
            # A comma within makes it a set, as plain text writes one.
            node = self._inner_list()
            self._require("}")
            return Node("set", node) if len(node) > 1 else node[0]
        if token.text == "|" and not self._bars:
            self._bars = 1
            node = self._sum()
            self._bars = 0
            self._require("|")
            return Node("call", (node,), "abs")
        if token.text == "." or token.text == ",":
            raise Unreadable(f"{token.text!r} is not read here")
        raise self._unreadable(token)

    def _inner_list(self) -> tuple[Node, ...]:
        bars, self._bars = self._bars, 0
        elements = [self._element()]
        while self._take(",", ";"):
            elements.append(self._element())
        self._bars = bars
        return tuple(elements)

    def _collection(self, opening: str) -> Node:
        """What is in ( or [: a group, a tuple, or an interval."""
        elements = self._inner_list()
        closing = self._next()
        if closing.kind != "sign" or closing.text not in (")", "]"):
            raise Unreadable(f"{_CLOSING[opening]} is missing")
        closed = (opening == "[", closing.text == "]")
        if len(elements) == 1:
            if closed[0] != closed[1]:
                raise Unreadable("brackets that do not match")
            return elements[0]
        if closed == (False, False):
            return Node("tuple", elements)
        if len(elements) == 2:
            return Node("interval", elements, closed)
        if closed == (True, True):
            return Node("list", elements)
        raise Unreadable("brackets that do not match")

    def _command(self, token: Token) -> Node:
        name = token.text
        if name == "frac":
            return Node("div", (self._group(), self._group()))
        if name == "sqrt":
            return self._root()
        if name == "binom":
            return Node("call", (self._group(), self._group()), "binom")
        if name == "pi" or name == "infty":
            return self._name(name)
        if name == "imath":
            return Node("constant", value="i")
        if name == "emptyset":
            return Node("set")
        if name == "ldots":
            return Node("dots")
        if name == "\\{":
            return self._set()
        if name == "langle":
            elements = self._inner_list()
            self._require("rangle")
            return Node("tuple", elements)
        if name in ("lfloor", "lceil"):
            return Node("call", (self._until(_CLOSING[name]),), "floor" if name == "lfloor" else "ceil")
        if name == "mathbf":
            return self._group()
        if name == "begin":
            return self._matrix()
        if name in FUNCTIONS or name in BRACKETED:
            return self._call(name)
        if name in _GREEK:
            return Node("symbol", value=name + ("_" + self._subscript() if self._take("_") else ""))
        raise self._unreadable(token)

    def _root(self) -> Node:
        degree = number(2)
        if self._take("["):
            degree = self._until("]")
        if self._is("("):
            return Node("root", (self._atom(), degree))
        if self._is("{"):
            return Node("root", (self._group(), degree))
        return Node("root", (self._atom(), degree))

    def _set(self) -> Node:
        if self._take("\\}"):
            return Node("set")
        elements = self._inner_list()
        self._require("\\}")
        return Node("set", elements)

    def _matrix(self) -> Node:
        self._require("{")
        name = self._environment()
        if name.rstrip("*") not in ("pmatrix", "bmatrix", "matrix", "Bmatrix", "smallmatrix", "array"):
            raise Unreadable(f"the environment {name}", known_elsewhere=True)
        if name == "array" and self._take("{"):
            while not self._take("}"):
                if self._next().kind == "end":
                    raise Unreadable("} is missing")
        rows: list[list[Node]] = [[]]
        while True:
            rows[-1].append(self._until_separator())
            if self._take("&"):
                continue
            if self._take("\\\\"):
                if self._is("end"):
                    break
                rows.append([])
                continue
            break
        self._require("end")
        self._require("{")
        if self._environment() != name or len({len(row) for row in rows}) != 1:
            raise Unreadable("a matrix whose rows differ in length, or that does not end")
        return Node("matrix", tuple(cell for row in rows for cell in row), (len(rows), len(rows[0])))

    def _environment(self) -> str:
        """Its name, behind the opening brace, and the closing brace."""
        parts = []
        while not self._take("}"):
            token = self._next()
            if token.kind == "end":
                raise Unreadable("} is missing")
            parts.append(token.text)
        return "".join(parts)


def _added(terms: list[Node]) -> Node:
    return terms[0] if len(terms) == 1 else Node("add", tuple(terms))


def read_number(text: str) -> Node:
    """Return the number or decimal that `text` is. Raises Unreadable if its exponent is too large."""
    mantissa, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) > _MAX_EXPONENT:
        raise Unreadable("an exponent of ten that is too large")
    whole, point, fraction = mantissa.partition(".")
    digits = int(whole + fraction or "0") if len(whole + fraction) <= 4000 else 0
    value = Fraction(digits, 10 ** len(fraction)) * Fraction(10) ** int(exponent or 0)
    if not point and not exponent:
        return number(value)
    return Node("decimal", value=(value, len((whole + fraction).lstrip("0"))))
