"""The position in a formula's tokens: the base of the parser, on which brackets, atoms and arithmetic (`parser.py`) build."""

from megatron_aspo.rewards.math.tokens import Token, tokenize
from megatron_aspo.rewards.math.tree import Node, Unreadable

CLOSING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "langle": "rangle", "lfloor": "rfloor", "lceil": "rceil", "|": "|"}
GREEK = """
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega ell hbar aleph Pr
    Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega
""".split()  # noqa: SIM905
ELSEWHERE = """
    sum prod int iint oint lim limsup liminf end mathbf det operatorname partial nabla bmod mod sup inf arg Re Im dot
    prime forall exists neg not cap subset subseteq overbrace underbrace stackrel overset underset oplus otimes circ rightarrow Rightarrow
    implies iff perp parallel cong sim propto notin
""".split()  # noqa: SIM905
"""Commands that are mathematics but are not read here."""
DECORATIONS = ("vec", "hat", "bar", "tilde", "overline", "overrightarrow", "widehat", "angle", "triangle")
"""Commands that form a name with the letters after them."""


class Cursor:
    """Tokens and the current position. Subclasses implement the methods at the end."""

    def __init__(self, text: str):
        """Raises Unreadable for a text that is too long."""
        self.tokens, self.position, self.depth = tokenize(text), 0, 0
        self.bars = False
        """Whether the next | closes an absolute value."""

    @property
    def token(self) -> Token:
        """The next token."""
        return self.tokens[self.position]

    def at(self, *texts: str) -> bool:
        """Return whether the next token is one of these signs or commands."""
        token = self.token
        return token.kind in ("sign", "command") and token.text in texts

    def take(self, *texts: str) -> bool:
        """Consume the next token if it is one of these signs or commands; return whether it was."""
        if self.at(*texts):
            self.position += 1
            return True
        return False

    def next(self) -> Token:
        """Consume and return any token, except that the end is not consumed."""
        token = self.token
        self.position += token.kind != "end"
        return token

    def require(self, text: str) -> None:
        if not self.take(text):
            raise Unreadable(f"{text} is missing")

    def expect_end(self) -> None:
        if self.token.kind != "end":
            raise self.unreadable(self.token)

    def unreadable(self, token: Token) -> Unreadable:
        """Return the error for a token that is not allowed here."""
        known = token.kind == "command" and token.text in ELSEWHERE
        return Unreadable(f"{token.text!r} is not read here" if token.text else "it ends too early", known_elsewhere=known)

    def subscript(self) -> str:
        """Read a subscript; return its text without blanks."""
        if not self.take("{"):
            return self.next().text
        parts, depth = [], 1
        while depth:
            token = self.next()
            if token.kind == "end":
                raise Unreadable("} is missing")
            depth += {"{": 1, "}": -1}.get(token.text, 0) if token.kind == "sign" else 0
            parts.append(token.text if depth else "")
        return "".join(parts)

    def environment(self) -> str:
        """Read the name of an environment and its closing brace; return the name."""
        parts = []
        while not self.take("}"):
            token = self.next()
            if token.kind == "end":
                raise Unreadable("} is missing")
            parts.append(token.text)
        return "".join(parts)

    def element(self) -> Node:
        raise NotImplementedError

    def sum(self) -> Node:
        raise NotImplementedError

    def power(self) -> Node:
        raise NotImplementedError

    def exponent(self) -> Node:
        raise NotImplementedError

    def atom(self) -> Node:
        raise NotImplementedError

    def starts_factor(self) -> bool:
        raise NotImplementedError
