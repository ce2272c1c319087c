"""Write an evaluation as the files that Archer2.0's evaluation leaves: python tools/export_eval.py EVALUATION --to OUT/TASK.parquet

EVALUATION is a directory that `megatron-aspo eval` wrote, whose data files still exist. The tool writes

    OUT/TASK.parquet        the evaluated rows, with a column `responses` of n texts each
    OUT/TASK.results.json   the metrics with their intervals
    OUT/TASK.pass.csv       model_path, dataset, pass@1 (the mean over all responses) and pass@n (the share of problems with a right one)

each atomically, the table last: where it exists, all three do. The last line printed is {"rows": …, "pass@1": …, "pass@N": …}.
"""

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_aspo.common.atomic import disk_errors, write_text
from megatron_aspo.common.errors import UserError
from megatron_aspo.common.options import build
from megatron_aspo.evaluation.options import EvalSettings
from megatron_aspo.evaluation.parts import PartStore
from megatron_aspo.evaluation.problems import rows_of
from megatron_aspo.evaluation.records import EvalResponse
from megatron_aspo.evaluation.report import PARTS, RESULT
from megatron_aspo.evaluation.result import group_by_problem


def export(directory: Path, target: Path, model: str) -> dict[str, Any]:
    """Write the three files. Raises UserError for an evaluation that is not complete, and for data files that have changed."""
    if not (directory / RESULT).is_file():
        raise UserError(f"{directory} has no {RESULT}: complete the evaluation first, with megatron-aspo eval")
    result = json.loads((directory / RESULT).read_text(encoding="utf-8"))
    settings = build(EvalSettings, result["settings"])
    store = PartStore(directory / PARTS, result["data"]["problems"], settings.part_problems)
    rows, right, scored = [], 0, 0
    for row, group in zip(evaluated_rows(settings, result), group_by_problem(store.responses()), strict=True):
        check_same(row, group[0])
        rows.append({name: plain(value) for name, value in row.items()} | {"responses": [response.response for response in group]})
        right += any(response.right for response in group)
        scored += sum(response.right for response in group)
    passes = {"pass@1": scored / len(rows) / settings.samples, f"pass@{settings.samples}": right / len(rows)}
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([["model_path", "dataset", *passes], [model, target.stem, *passes.values()]])
    unfinished = target.with_name(f".{target.name}.unfinished")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(rows), unfinished)
        os.replace(unfinished, target)
        write_text(target.with_suffix(".results.json"), json.dumps(result["result"], indent=1) + "\n")
        write_text(target.with_suffix(".pass.csv"), table.getvalue())
    return {"rows": len(rows), **passes}


def evaluated_rows(settings: EvalSettings, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the fields of the evaluated rows, in their order."""
    if settings.task != "dataset":
        raise UserError(f"the evaluation is of task={settings.task}, which has no data files; export one of files")
    for location in settings.data.eval_path:
        for row in rows_of(settings, location, {}):
            yield row.fields


def check_same(row: dict[str, Any], response: EvalResponse) -> None:
    """Raise UserError unless the row has the question that was answered."""
    prompt = row["prompt"]
    text = prompt[-1]["content"] if isinstance(prompt, list) else prompt
    if text != response.prompt:
        raise UserError(f"the data files are not those of the evaluation: {response.problem} asks something else now; put them back")


def plain(value: Any) -> Any:
    """Return texts, numbers and messages unchanged, anything else as JSON text: a column has one type."""
    is_messages = isinstance(value, list) and all(isinstance(entry, dict) and set(entry) == {"role", "content"} for entry in value)
    return value if value is None or isinstance(value, str | int | float) or is_messages else json.dumps(value, ensure_ascii=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--to", type=Path, required=True, metavar="OUT/TASK.parquet")
    parser.add_argument("--model", default="", help="model_path in the table; default: EVALUATION")
    options = parser.parse_args()
    try:
        print(json.dumps(export(options.evaluation, options.to, options.model or str(options.evaluation))))
    except (UserError, OSError) as error:
        parser.exit(2, f"export_eval: error: {error}\n")


if __name__ == "__main__":
    main()
