"""Parsing of atoms: numbers, letters, functions with their arguments, and commands."""

from fractions import Fraction

from megatron_aspo.rewards.math.brackets import Brackets
from megatron_aspo.rewards.math.cursor import CLOSING, DECORATIONS, GREEK
from megatron_aspo.rewards.math.notation import BRACKETED, FUNCTIONS
from megatron_aspo.rewards.math.tokens import Token
from megatron_aspo.rewards.math.tree import INFINITY, Node, Unreadable, negative, number

_MAX_EXPONENT = 100_000
"""Largest exponent of ten in a number such as 1e5."""


class Atoms(Brackets):
    """Parser of one atom."""

    def atom(self) -> Node:
        token = self.next()
        if token.kind == "number":
            return self.subscripted_number(token)
        if token.kind == "letter":
            return self._letter(token)
        if token.kind == "named_set":
            return Node("named_set", value=token.text)
        if token.kind == "name":
            return self.name(token.text)
        if token.kind == "sign":
            return self.bracketed(token)
        if token.kind == "command":
            return self._command(token)
        raise self.unreadable(token)

    def subscripted_number(self, token: Token) -> Node:
        if self.at("_"):
            self.position += 1
            base = self.subscript()
            if not base.isdigit() or not token.text.isdigit() or not max(1, *map(int, token.text)) < int(base[:3]) <= 36:
                raise Unreadable("a number with a subscript that is no base")
            return Node("based", value=(token.text, int(base)))
        return read_number(token.text)

    def _letter(self, token: Token) -> Node:
        if token.text in "ei" and not self.at("_", "'"):
            return Node("constant", value=token.text)
        name = token.text
        if self.take("_"):
            name += "_" + self.subscript()
        while self.take("'"):
            name += "'"
        if name[0] in "fg" and self.at("(") and not self.token.spaced:
            self.position += 1
            return Node("function", (self.until(")"),), name)
        return Node("symbol", value=name)

    def name(self, name: str) -> Node:
        if name == "pi":
            return Node("constant", value="pi")
        if name in ("infinity", "infty", "inf", "oo"):
            return INFINITY
        return self.call(name)

    def _command(self, token: Token) -> Node:
        name = token.text
        if name == "frac":
            return Node("div", (self.group(), self.group()))
        if name == "sqrt":
            return self._root()
        if name == "binom":
            return Node("call", (self.group(), self.group()), "binom")
        if name == "pi" or name == "infty":
            return self.name(name)
        if name == "imath":
            return Node("constant", value="i")
        if name == "emptyset":
            return Node("set")
        if name == "ldots":
            return Node("dots")
        if name == "\\{":
            return self.braced_set()
        if name == "langle":
            elements = self.inner_list()
            self.require("rangle")
            return Node("tuple", elements)
        if name in ("lfloor", "lceil"):
            return Node("call", (self.until(CLOSING[name]),), "floor" if name == "lfloor" else "ceil")
        if name == "mathbf":
            return self.group()
        if name == "begin":
            return self.matrix()
        if name in FUNCTIONS or name in BRACKETED:
            return self.call(name)
        if name in DECORATIONS:
            return self.decorated(name)
        if name in GREEK:
            return Node("symbol", value=name + ("_" + self.subscript() if self.take("_") else ""))
        raise self.unreadable(token)

    def decorated(self, name: str) -> Node:
        """Read a variable named by the text below an arrow, bar or hat, or after the sign of an angle or triangle."""
        if self.at("{"):
            return Node("symbol", value=f"{name} {self.subscript()}")
        letters = []
        while self.token.kind == "letter":
            letters.append(self.next().text)
        if not letters:
            raise Unreadable(f"{name} without letters", known_elsewhere=True)
        return Node("symbol", value=f"{name} {''.join(letters)}")

    def _root(self) -> Node:
        degree = number(2)
        if self.take("["):
            degree = self.until("]")
        if self.at("("):
            return Node("root", (self.atom(), degree))
        if self.at("{"):
            return Node("root", (self.group(), degree))
        return Node("root", (self.atom(), degree))

    def call(self, name: str) -> Node:
        """Read a function's argument; without brackets it is the product up to the next sign or function."""
        if name in BRACKETED:
            if name == "sqrt" and not self.at("(", "{"):
                return Node("root", (self.atom(), number(2)))
            opening = self.next().text
            if opening not in ("(", "{"):
                raise Unreadable(f"{name} without brackets")
            arguments = [self.until_comma()]
            while self.take(","):
                arguments.append(self.until_comma())
            self.require(CLOSING[opening])
            if name in ("sqrt", "cbrt"):
                return Node("root", (arguments[0], number(2 if name == "sqrt" else 3)))
            return Node("call", tuple(arguments), name)
        base = None
        if self.take("_"):
            base = self.group()
        exponent = self.exponent() if self.take("^") else None
        node = Node("call", (self._argument(),), name)
        if base is not None:
            if name != "log":
                raise Unreadable(f"a subscript of {name}")
            node = Node("div", (node, Node("call", (base,), "log")))
        if exponent == negative(number(1)) and name not in ("ln", "log", "lg", "exp"):
            return Node("call", node.args, "arc" + name)
        return Node("pow", (node, exponent)) if exponent is not None else node

    def _argument(self) -> Node:
        if self.at("(", "{"):
            return self.bracketed_argument()
        node = self.power()
        while self.starts_factor() and not (self.token.kind == "name" or self.token.text in FUNCTIONS) and not self.at("("):
            node = Node("mul", (node, self.power()))
        return node

    def bracketed_argument(self) -> Node:
        """Read a bracketed argument. A power that follows it applies to the function's value."""
        closing = CLOSING[self.next().text]
        return self.until(closing)


def read_number(text: str) -> Node:
    """Return `text` as a number or decimal. Raises Unreadable if its exponent is too large."""
    mantissa, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) > _MAX_EXPONENT:
        raise Unreadable("an exponent of ten that is too large")
    whole, point, fraction = mantissa.partition(".")
    digits = int(whole + fraction or "0") if len(whole + fraction) <= 4000 else 0
    value = Fraction(digits, 10 ** len(fraction)) * Fraction(10) ** int(exponent or 0)
    if not point and not exponent:
        return number(value)
    return Node("decimal", value=(value, len((whole + fraction).lstrip("0"))))
