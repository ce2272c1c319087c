"""A recursive-descent parser of formulas in LaTeX or plain text. It builds trees and computes nothing.

By increasing precedence: lists (`,` `;` and, or), unions, relations, sums, products (also without a sign; `/` has the precedence of `·`,
from left to right), signs, powers and `!`. An integer before a fraction of integers below 1 is a mixed number.
"""

from megatron_aspo.rewards.math.atoms import Atoms
from megatron_aspo.rewards.math.cursor import DECORATIONS, GREEK
from megatron_aspo.rewards.math.notation import BRACKETED, FUNCTIONS
from megatron_aspo.rewards.math.tree import Node, Unreadable, negative, number

_MAX_DEPTH = 40
_STARTS = {
    "(",
    "[",
    "{",
    "\\{",
    "frac",
    "sqrt",
    "binom",
    "langle",
    "lfloor",
    "lceil",
    "pi",
    "infty",
    "imath",
    "begin",
    "mathbf",
    *DECORATIONS,
}
"""Signs and commands that begin a factor."""
_RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "<=", "ge": ">=", "ne": "!=", "approx": "~", "equiv": "=", "in": "in"}
_SUM_SIGNS = {"+": "add", "-": "sub", "pm": "pm", "mp": "mp"}


def parse(text: str) -> Node:
    """Return the tree of a cleaned text. Raises Unreadable."""
    parser = _Parser(text)
    node = parser.listed()
    parser.expect_end()
    return node


class _Parser(Atoms):
    def listed(self) -> Node:
        """Read elements separated at the outermost level; a single one is returned itself."""
        elements, separators = [self.element()], set()
        while separator := self._separator():
            separators.add(separator)
            elements.append(self.element())
        if len(elements) == 1:
            return elements[0]
        if separators == {"or"} and all(element.op in ("relation", "member") and element.value != ("=",) for element in elements):
            return Node("union", tuple(elements))
        return Node("list", tuple(elements))

    def _separator(self) -> str:
        """Consume a separator and return its meaning; empty if there is none."""
        separator = ""
        if self.take(",", ";"):
            separator = ","
        token = self.token
        if token.kind == "text" and token.text in ("and", "or", ", and", ", or"):
            self.position += 1
            return token.text.split()[-1]
        for word in ("and", "or"):
            letters = self.tokens[self.position : self.position + len(word)]
            if "".join(letter.text for letter in letters) == word and letters[0].spaced and not any(one.spaced for one in letters[1:]):
                self.position += len(word)
                return word
        return separator

    def element(self) -> Node:
        """Read a set built of sets, or a relation."""
        node = self._relation()
        while True:
            if self.take("cup"):
                node = Node("union", (*(node.args if node.op == "union" else (node,)), self._relation()))
            elif self.take("setminus"):
                node = Node("minus", (node, self._relation()))
            else:
                return node

    def _relation(self) -> Node:
        parts, signs = [self.sum()], []
        while self.token.kind in ("sign", "command") and self.token.text in _RELATIONS:
            signs.append(_RELATIONS[self.next().text])
            parts.append(self.element() if signs[-1] == "in" else self.sum())
        if not signs:
            return self._ratio(parts[0])
        if "in" in signs:
            if len(signs) > 1:
                raise Unreadable("a chain with ∈")
            return Node("member", tuple(parts))
        return Node("relation", tuple(parts), tuple(signs))

    def _ratio(self, first: Node) -> Node:
        terms = [first]
        while self.take(":"):
            terms.append(self.sum())
        return Node("ratio", tuple(terms)) if len(terms) > 1 else first

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Unreadable(f"nested more than {_MAX_DEPTH} deep")
        terms = [self._signed()]
        while self.token.kind in ("sign", "command") and (kind := _SUM_SIGNS.get(self.token.text)):
            self.position += 1
            term = self._product()
            if kind in ("pm", "mp"):
                terms = [Node("pm", (_added(terms), term), 1 if kind == "pm" else -1)]
            else:
                terms.append(negative(term) if kind == "sub" else term)
        self.depth -= 1
        return _added(terms)

    def _signed(self) -> Node:
        if self.take("-"):
            return negative(self._signed_product())
        if self.take("+"):
            return self._signed_product()
        if self.at("pm", "mp"):
            sign = 1 if self.next().text == "pm" else -1
            return Node("pm", (number(0), self._product()), sign)
        return self._product()

    def _signed_product(self) -> Node:
        return negative(self._product()) if self.take("-") else self._product()

    def _product(self) -> Node:
        node = self.power()
        while True:
            if self.take("times", "cdot", "*"):
                node = Node("mul", (node, self._factor_after_sign()))
            elif self.take("/"):
                node = Node("div", (node, self._factor_after_sign()))
            elif self.starts_factor():
                node = self._implicit_product(node)
            else:
                return node

    def _factor_after_sign(self) -> Node:
        if self.take("-"):
            return negative(self.power())
        self.take("+")
        return self.power()

    def starts_factor(self) -> bool:
        token = self.token
        if token.kind in ("sign", "command"):
            if token.text == "|":
                return not self.bars
            return token.text in _STARTS or (token.kind == "command" and (token.text in GREEK or token.text in (*FUNCTIONS, *BRACKETED)))
        if token.kind in ("letter", "name"):
            return not self._starts_separator()
        return token.kind == "number"

    def _starts_separator(self) -> bool:
        before = self.position
        found = self.token.spaced and bool(self._separator())
        self.position = before
        return found

    def _implicit_product(self, node: Node) -> Node:
        """Read a product without a sign, or a mixed number."""
        is_number, start = self.token.kind == "number", self.position
        factor = self.power()
        whole = node.args[0] if node.op == "neg" else node
        if whole.op == "number" and whole.value.denominator == 1 and self.tokens[start - 1].kind == "number":
            if factor.op == "div" and all(part.op == "number" for part in factor.args):
                if 0 < factor.args[0].value < factor.args[1].value:
                    return Node("add", (node, factor))
            elif is_number and factor.op == "number" and self.at("/"):
                self.position += 1
                below = self.power()
                if below.op == "number" and factor.value < below.value:
                    return Node("add", (node, Node("div", (factor, below))))
                raise Unreadable("two numbers side by side")
        if is_number and self.tokens[start - 1].kind == "number":
            raise Unreadable("two numbers side by side")
        return Node("mul", (node, factor))

    def power(self) -> Node:
        node = self.atom()
        while True:
            if self.take("!"):
                node = Node("factorial", (node,))
            elif self.take("%"):
                node = Node("div", (node, number(100)))
            elif self.take("^"):
                circle = self.take("circ") or self.take_group("circ")
                node = Node("degree", (node,)) if circle else Node("pow", (node, self.exponent()))
            else:
                return node

    def take_group(self, command: str) -> bool:
        """Consume `{\\command}` if it is next."""
        tokens = self.tokens[self.position : self.position + 3]
        if [token.text for token in tokens] == ["{", command, "}"]:
            self.position += 3
            return True
        return False

    def exponent(self) -> Node:
        if self.take("-"):
            return negative(self.exponent())
        if self.take("{"):
            return self.until("}")
        node = self.atom()
        return Node("pow", (node, self.exponent())) if self.take("^") else node


def _added(terms: list[Node]) -> Node:
    return terms[0] if len(terms) == 1 else Node("add", tuple(terms))
