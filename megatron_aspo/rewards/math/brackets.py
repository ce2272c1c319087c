"""Parsing of brackets of every kind: groups, tuples, intervals, sets and matrices."""

from megatron_aspo.rewards.math.cursor import CLOSING, Cursor
from megatron_aspo.rewards.math.tokens import Token
from megatron_aspo.rewards.math.tree import Node, Unreadable, number


class Brackets(Cursor):
    """Parser of everything that begins with a bracket."""

    def until(self, closing: str) -> Node:
        """Read a formula and its closing bracket."""
        node = self.until_comma()
        self.require(closing)
        return node

    def until_comma(self) -> Node:
        """Read a formula up to the first token that cannot belong to it."""
        bars, self.bars = self.bars, False
        node = self.sum()
        self.bars = bars
        return node

    def inner_list(self) -> tuple[Node, ...]:
        """Read elements separated by commas or semicolons."""
        bars, self.bars = self.bars, False
        elements = [self.element()]
        while self.take(",", ";"):
            elements.append(self.element())
        self.bars = bars
        return tuple(elements)

    def bracketed(self, token: Token) -> Node:
        """Read what the opening sign `token` encloses."""
        if token.text in "([":
            return self.collection(token.text)
        if token.text == "{":
            # A comma inside makes it a set, written in plain text.
            elements = self.inner_list()
            self.require("}")
            return elements[0] if len(elements) == 1 else Node("set", elements)
        if token.text == "|" and not self.bars:
            self.bars = True
            node = self.sum()
            self.bars = False
            self.require("|")
            return Node("call", (node,), "abs")
        if token.text == "." or token.text == ",":
            raise Unreadable(f"{token.text!r} is not read here")
        raise self.unreadable(token)

    def collection(self, opening: str) -> Node:
        """Read the content of ( or [: a group, a tuple, or an interval."""
        elements = self.inner_list()
        closing = self.next()
        if closing.kind != "sign" or closing.text not in (")", "]"):
            raise Unreadable(f"{CLOSING[opening]} is missing")
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

    def braced_set(self) -> Node:
        if self.take("\\}"):
            return Node("set")
        elements = self.inner_list()
        self.require("\\}")
        return Node("set", elements)

    def matrix(self) -> Node:
        self.require("{")
        name = self.environment()
        if name.rstrip("*") not in ("pmatrix", "bmatrix", "matrix", "Bmatrix", "smallmatrix", "array"):
            raise Unreadable(f"the environment {name}", known_elsewhere=True)
        if name == "array" and self.take("{"):
            while not self.take("}"):
                if self.next().kind == "end":
                    raise Unreadable("} is missing")
        rows: list[list[Node]] = [[]]
        while True:
            rows[-1].append(self.until_comma())
            if self.take("&"):
                continue
            if self.take("\\\\"):
                if self.at("end"):
                    break
                rows.append([])
                continue
            break
        self.require("end")
        self.require("{")
        if self.environment() != name or len({len(row) for row in rows}) != 1:
            raise Unreadable("a matrix whose rows differ in length, or that does not end")
        return Node("matrix", tuple(cell for row in rows for cell in row), (len(rows), len(rows[0])))

    def group(self) -> Node:
        """Read the argument of a command: a group, or one digit, letter or command."""
        if self.take("{"):
            return self.until("}")
        token = self.token
        if token.kind == "number" and len(token.text) > 1 and token.text.isdigit():
            self.tokens[self.position] = Token("number", token.text[1:], token.start + 1)
            return number(int(token.text[0]))
        return self.atom()
