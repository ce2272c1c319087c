"""The results of an evaluation: result.json, problems.csv, the printed table, and one JSON line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_aspo.common.atomic import disk_errors, write_text
from megatron_aspo.common.errors import UserError
from megatron_aspo.common.options import build
from megatron_aspo.evaluation.options import EvalSettings
from megatron_aspo.evaluation.parts import PartStore
from megatron_aspo.evaluation.plan import EvalPlan, EvalRecord
from megatron_aspo.evaluation.result import (
    ProblemResult,
    SameAnswer,
    difference,
    format_difference,
    format_summary,
    group_by_problem,
    problems_csv,
    same_text,
    summarize,
)
from megatron_aspo.rewards.choice import RewardChoice

RESULT, TABLE, PARTS = "result.json", "problems.csv", "parts"
GENERATED = "generated"
"""Name of the file that marks all parts as generated, graded or not."""


def report(out: Path, plan: EvalPlan, against: Path | None) -> dict[str, Any]:
    """Write result.json and problems.csv, then print the table and, last, the result as one JSON line."""
    settings = plan.settings
    problems = read_problems(out, settings)
    _check_failures(problems, settings)
    result = EvalRecord(out).read() | {"result": summarize(problems)}
    with disk_errors(out):
        write_text(out / TABLE, problems_csv(problems))
        write_text(out / RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    named = ", ".join(f"{key}={value}" for key, value in plan.changed.items())
    print(f"{plan.protocol}{' with ' + named if named else ''}: {out}")
    print("\n".join(format_summary(result["result"])))
    line = {"protocol": plan.protocol, "changed": plan.changed, "out": str(out), **result["result"]}
    if against:
        other = against.expanduser().absolute()
        changes = difference(problems, read_problems(other, _settings_of(other)))
        print(f"against {other}\n" + "\n".join(format_difference(changes)))
        line |= {"against": str(other), "difference": changes}
    print(json.dumps(line, ensure_ascii=False), flush=True)
    return result


def _check_failures(problems: Sequence[ProblemResult], settings: EvalSettings) -> None:
    """Print how many responses the reward gave no score, if any. Raises UserError if it gave none at all."""
    failed, responses = sum(problem.failed for problem in problems), settings.samples * len(problems)
    if failed == responses:
        raise UserError(f"the reward timed out or crashed on all of {failed} responses; correct it, or raise data.reward_timeout_s")
    if failed:
        score = settings.data.reward_failure_score
        print(f"the reward timed out or crashed on {failed} of {responses} responses; their score is {score:g} (data.reward_failure_score)")


def read_problems(out: Path, settings: EvalSettings) -> list[ProblemResult]:
    """Return the results of a complete evaluation, problem by problem."""
    count = EvalRecord(out).read()["data"]["problems"]
    store = PartStore(out / PARTS, count, settings.part_problems)
    if store.missing() or any(True for _ in store.ungraded()):
        raise UserError(f"the evaluation {out} is not complete; run it again with the same values to complete it")
    groups, same = group_by_problem(store.responses()), _same_answer(settings)
    return [ProblemResult.of(group, settings.pass_at, settings.majority_at, same) for group in groups]


def _same_answer(settings: EvalSettings) -> SameAnswer:
    """Return the equality by which maj@k groups wrong answers: the math reward's if it grades, else that of texts."""
    if "math" not in RewardChoice(settings.data).names:
        return same_text
    from megatron_aspo.rewards.math.verdict import verdict

    # Not by math-verify, which forks: this process has threads.
    return lambda answer, other: verdict(answer, other, settings.data.math, ask_math_verify=False).correct


def _settings_of(out: Path) -> EvalSettings:
    record = EvalRecord(out).read()
    if not record:
        raise UserError(f"{out} is no evaluation's directory; name one that megatron-aspo eval wrote")
    return build(EvalSettings, record["settings"])
