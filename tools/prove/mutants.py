"""Defines the mutants of a source file: every way in which one operator changes one node of its syntax tree.

The operators are those of mutmut 3, on Python's own `ast`, without those for bytes and complex numbers; those for returned values and the
last four, for tensors and branches, are added. Unlike mutmut's they also apply at module level, in decorators and in decorated functions.

comparison    < and <=, > and >=, == and !=, is and is not, in and not in: one for the other
arithmetic    + and -, * and /, << and >>, & and |: one for the other; // and % become /, ** becomes *, ^ becomes &; also in `a += b`
unary         -, +, ~ and `not` dropped
boolean       `and` and `or`, True and False: one for the other
constant      a number + 1; a string, or a literal part of an f-string, between XX and XX, in lower and in upper case; None becomes ""
value         what is assigned or returned becomes None; `a += b` becomes `a = b`; the body of a lambda becomes None
argument      each argument of a call replaced by None; left out, if there are several; dict(a=…) called with aXX
choice        the condition of `a if c else b` with `and False` and with `or True`; each case of a `match` left out
jump          `break` becomes `return`, `continue` becomes `break`
name          lower and upper, find and rfind, … of strings: one for the other; deepcopy becomes copy
detach        `.detach()` deleted
branch        the branches of an `if`, the filter of a comprehension, `a if c else b` and torch.where swapped
opposite      min and max, minimum and maximum, any and all, sum and mean, …: one for the other
clamp         a clamp or clip deleted

Left alone: docstrings and other bare strings, annotations, imports, `__all__`, and code that only a type checker runs.
"""

import ast
import copy
import difflib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

Edit = tuple[ast.AST, ast.AST]
"""A node of the tree, and its replacement."""


def _both_ways(*pairs: tuple) -> dict:
    return dict(pairs) | {b: a for a, b in pairs}


COMPARISON = _both_ways((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn))
ARITHMETIC = _both_ways((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.LShift, ast.RShift), (ast.BitAnd, ast.BitOr)) | {
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Div,
    ast.Pow: ast.Mult,
    ast.BitXor: ast.BitAnd,
}
BOOLEAN = _both_ways((ast.And, ast.Or))
BUILTINS = _both_ways(("min", "max"), ("any", "all"))
METHODS = BUILTINS | _both_ways(
    *(("minimum", "maximum"), ("amin", "amax"), ("argmin", "argmax"), ("cummin", "cummax"), ("sum", "mean"), ("zeros_like", "ones_like")),
    *(("lower", "upper"), ("lstrip", "rstrip"), ("find", "rfind"), ("ljust", "rjust"), ("index", "rindex"), ("split", "rsplit")),
    *(("removeprefix", "removesuffix"), ("partition", "rpartition")),
)
CLAMPS = ("clamp", "clip", "clamp_min", "clamp_max")
ARRAYS = ("torch", "np", "numpy")


def _with(node: ast.AST, **fields) -> ast.AST:
    """Return a shallow copy of the node with the given fields replaced."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _without_each(items: list) -> Iterator[list]:
    return (items[:i] + items[i + 1 :] for i in range(len(items)))


def _none_or_empty(value: ast.expr) -> ast.Constant:
    return ast.Constant("" if isinstance(value, ast.Constant) and value.value is None else None)


def _negated(test: ast.expr) -> ast.expr:
    # Spelled as the comparison and unary operators do where they mean the same, so that it is one mutant and not two.
    match test:
        case ast.UnaryOp(ast.Not(), operand):
            return operand
        case ast.Compare(ops=[ast.Eq() | ast.NotEq() | ast.Is() | ast.IsNot() | ast.In() | ast.NotIn() as op]):
            return _with(test, ops=[COMPARISON[type(op)]()])
    return ast.UnaryOp(ast.Not(), test)


def edits(node: ast.AST) -> Iterator[Edit]:
    """Yield the edits of one node, each of them one mutant."""
    match node:
        case ast.Compare():
            for i, op in enumerate(node.ops):
                yield node, _with(node, ops=[*node.ops[:i], COMPARISON[type(op)](), *node.ops[i + 1 :]])
        case ast.BinOp() if type(node.op) in ARITHMETIC:
            yield node, _with(node, op=ARITHMETIC[type(node.op)]())
        case ast.AugAssign():
            yield node, ast.Assign([node.target], node.value)
            if type(node.op) in ARITHMETIC:
                yield node, _with(node, op=ARITHMETIC[type(node.op)]())
        case ast.UnaryOp():
            yield node, node.operand
        case ast.BoolOp():
            for i in range(1, len(node.values)):
                sides = [half[0] if len(half) == 1 else ast.BoolOp(node.op, half) for half in (node.values[:i], node.values[i:])]
                yield node, ast.BoolOp(BOOLEAN[type(node.op)](), sides)
        case ast.Constant(value=None):
            yield node, ast.Constant("")
        case ast.Constant(value=bool(value)):
            yield node, ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield node, ast.Constant(value + 1)
        case ast.Constant(value=str(value)):
            yield from ((node, ast.Constant(new)) for new in (f"XX{value}XX", value.lower(), value.upper()))
        case ast.Assign() | ast.AnnAssign() | ast.Return() if node.value:
            yield node.value, _none_or_empty(node.value)
        case ast.Lambda():
            yield node.body, _none_or_empty(node.body)
        case ast.Break():
            yield node, ast.Return()
        case ast.Continue():
            yield node, ast.Break()
        case ast.If():
            yield node.test, _negated(node.test)
        case ast.comprehension():
            yield from ((test, _negated(test)) for test in node.ifs)
        case ast.IfExp():
            yield node, _with(node, body=node.orelse, orelse=node.body)
            yield node.test, ast.BoolOp(ast.And(), [node.test, ast.Constant(False)])
            yield node.test, ast.BoolOp(ast.Or(), [node.test, ast.Constant(True)])
        case ast.Match() if len(node.cases) > 1:
            yield from ((node, _with(node, cases=cases)) for cases in _without_each(node.cases))
        case ast.Call():
            yield from _call_edits(node)


def _call_edits(call: ast.Call) -> Iterator[Edit]:
    for value in [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg)]:
        if not isinstance(value, ast.Starred):
            yield value, _none_or_empty(value)
    if len(call.args) + len(call.keywords) > 1:
        yield from ((call, _with(call, args=args)) for args in _without_each(call.args))
        yield from ((call, _with(call, keywords=keywords)) for keywords in _without_each(call.keywords))
    match call.func:
        case ast.Name("dict"):
            yield from ((keyword, _with(keyword, arg=f"{keyword.arg}XX")) for keyword in call.keywords if keyword.arg)
        case ast.Name(name) if name in BUILTINS:
            yield call.func, _with(call.func, id=BUILTINS[name])
        case ast.Name("deepcopy"):
            yield call.func, _with(call.func, id="copy")
        case ast.Attribute(owner, name):
            function = isinstance(owner, ast.Name) and owner.id in ARRAYS
            if name in METHODS:
                yield call.func, _with(call.func, attr=METHODS[name])
            if name == "deepcopy":
                yield call.func, _with(call.func, attr="copy")
            if name == "detach" and not call.args:
                yield call, owner
            if name in CLAMPS and (call.args or not function):
                yield call, call.args[0] if function else owner
            if name == "where" and function and len(call.args) == 3:
                condition, yes, no = call.args
                yield call, _with(call, args=[condition, no, yes])


class Key(NamedTuple):
    """Identifies a mutant in the list of the equivalent ones. Without line numbers, so that changes elsewhere leave it valid."""

    file: str
    """Relative to losses/."""
    function: str
    """Qualified name of the function or class, or <module>."""
    line: str
    """The source line on which the changed expression begins."""
    mutant: str
    """`before → after`; the second, third … of the same on such a line in the function ends in (2), (3) …"""


@dataclass(frozen=True)
class Mutant:
    key: Key
    line_number: int
    tree: ast.Module
    target: tuple[ast.AST, str, int | None]
    """Node, field and, where the field is a list, index of the replaced node."""
    new: ast.AST

    def __str__(self) -> str:
        return f"{self.key.file}:{self.line_number} {self.key.function}: {self.key.mutant}"

    def apply(self) -> ast.AST:
        """Put the fault into the tree; return the original node."""
        return _replace(self.target, self.new)

    def diff(self) -> str:
        before = ast.unparse(self.tree).splitlines()
        old = self.apply()
        after = ast.unparse(self.tree).splitlines()
        _replace(self.target, old)
        return "\n".join([line for line in difflib.unified_diff(before, after, n=0, lineterm="") if line[:2] not in ("--", "++", "@@")])


def _replace(target: tuple[ast.AST, str, int | None], new: ast.AST) -> ast.AST:
    node, field, index = target
    if index is None:
        old = getattr(node, field)
        setattr(node, field, new)
    else:
        old = getattr(node, field)[index]
        getattr(node, field)[index] = new
    return old


def _left_alone(node: ast.AST, parent: ast.AST, field: str) -> bool:
    if field in ("annotation", "returns", "type_params"):
        return True
    match node:
        case ast.Expr(ast.Constant(str())) | ast.Import() | ast.ImportFrom():
            return True
        case ast.If(ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")) | ast.Assign([ast.Name("__all__")]):
            return True
        case ast.Constant(value=None):
            # `x is ""` is never true: the same as swapping the branches, and a warning of the compiler.
            return isinstance(parent, ast.Compare)
    return False


def mutants(tree: ast.Module, source: str, file: str) -> list[Mutant]:
    """Return all mutants of one file, in tree order; `tree` is parsed from `source`. They share the tree: apply one at a time."""
    lines = source.splitlines()
    pending: defaultdict[ast.AST, list[ast.AST]] = defaultdict(list)
    times: Counter[Key] = Counter()
    found: list[Mutant] = []

    def visit(node: ast.AST, target: tuple, scope: tuple[str, ...], text: ast.AST | None) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            scope = (*scope, node.name)
        # Positions inside an f-string are not reliable before Python 3.12: its parts get the position where it begins.
        text = text or (node if isinstance(node, ast.JoinedStr) else None)
        for old, new in edits(node):
            if not hasattr(new, "lineno"):
                ast.copy_location(new, old)
            pending[old].append(ast.fix_missing_locations(new))
        unlike = {ast.unparse(new): new for new in pending.pop(node, [])}
        before = ast.unparse(node) if unlike else ""
        unlike.pop(before, None)
        for after, new in unlike.items():
            number = (text or node).lineno
            key = Key(file, ".".join(scope) or "<module>", lines[number - 1].strip(), f"{before} → {after}")
            times[key] += 1
            if times[key] > 1:
                key = key._replace(mutant=f"{key.mutant} ({times[key]})")
            found.append(Mutant(key, number, tree, target, new))
        for field, value in ast.iter_fields(node):
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST) and not _left_alone(child, node, field):
                    visit(child, (node, field, index), scope, text)

    visit(tree, (), (), None)
    return found
