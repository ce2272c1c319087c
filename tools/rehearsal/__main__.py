"""`tools/rehearse.sh`: makes hosts and data, rehearses once or twice, compares, and prints one JSON line."""

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from tests.hosts import ROOT, Hosts, why_not
from tools.rehearsal import compare, small_model
from tools.rehearsal.commands import HEAD, SUBJECTS, Commands, Sizes
from tools.rehearsal.data import laptop_code, write_archer_math, write_livecodebench
from tools.rehearsal.faults import faults, steps_done
from tools.rehearsal.listeners import WildcardListeners
from tools.rehearsal.session import Session

WHOLE = Sizes(
    ranks=2, steps=6, checkpoint_every=2, test_problems=30, samples=2, prompts=4, responses=6, prompt_tokens=256, response_tokens=48
)
SHORT = replace(WHOLE, ranks=1, steps=4, test_problems=4, responses=4, prompt_tokens=384, response_tokens=96)
"""Tokens are bytes."""
MODEL = ROOT / "models" / "smollm2-135m-instruct"


def main() -> int:
    parser = argparse.ArgumentParser(prog="rehearse.sh", description=__doc__)
    parser.add_argument("subject", nargs="?", choices=SUBJECTS, default="code")
    parser.add_argument("--short", action="store_true", help="a model that is made for the purpose, fewer steps and problems; code only")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="directory to make and keep, outside /tmp and the home directory")
    parsed = parser.parse_args()
    if reason := why_not():
        parser.exit(2, f"rehearse.sh: error: {reason}\n")
    if parsed.short and parsed.subject != "code":
        parser.error("--short is for code")
    if not parsed.short and not MODEL.exists():
        parser.exit(2, f"rehearse.sh: error: there is no {MODEL}; make it with python tools/make_smollm2.py\n")
    if parsed.keep:
        parsed.keep.mkdir(parents=True)
    place = parsed.keep.absolute() if parsed.keep else Path(tempfile.mkdtemp(prefix="aspo-rehearsal-", dir="/var/tmp"))
    try:
        return rehearse(place, parsed.subject, SHORT if parsed.short else WHOLE)
    except RuntimeError as error:
        print(f"rehearse.sh: error: {error}", file=sys.stderr)
        return 1
    finally:
        if not parsed.keep:
            shutil.rmtree(place)


def rehearse(place: Path, subject: str, sizes: Sizes) -> int:
    """Rehearse in `place`. Returns the exit status."""
    started = time.monotonic()
    model = MODEL if sizes is WHOLE else place / "model"
    if subject == "math":
        write_archer_math(place, sizes.test_problems)
    elif sizes is WHOLE:
        write_livecodebench(place, *laptop_code(sizes.test_problems))
    else:
        write_livecodebench(place, small_model.problems("train", 2 * sizes.prompts), small_model.problems("test", sizes.test_problems))
    kills = faults(sizes.steps, sizes.checkpoint_every) if subject == "code" else []
    names = (["disturbed"] if kills else []) + (["undisturbed"] if sizes is WHOLE or not kills else [])
    with Hosts(place / "hosts", 2, visible=[model.resolve(), place]) as hosts:
        rehearsals = [Commands(SUBJECTS[subject], sizes, model, place, place / name, hosts.hostfile, hosts.ssh_options) for name in names]
        first = Session(hosts, rehearsals[0])
        for command in rehearsals[0].prepare():
            first.call(HEAD, command)
        if sizes is SHORT:
            prepared = [place / "train.jsonl", place / "test" / rehearsals[0].test_file]
            rows = [json.loads(line) for path in prepared for line in path.read_text(encoding="utf-8").splitlines()]
            small_model.save_small_model(model, [row["prompt"] for row in rows])
        first.call(HEAD, rehearsals[0].show())
        left, listeners = 0, WildcardListeners(hosts)
        with listeners:
            for commands in rehearsals:
                print(f"--- {commands.place.name}, after {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
                left += Session(hosts, commands).rehearse(kills if commands.place.name == "disturbed" else [])
    for one in sorted(listeners.found):
        print(f"--- open to all: {one}")
    wrong = [reason for commands in rehearsals for reason in compare.missing_in_trackers(commands)]
    differing = [line for commands in rehearsals for line in compare.merged_differs(commands) + compare.redone_differs(commands.run)]
    if len(rehearsals) == 2:
        differing += compare.differences(*rehearsals)
    for commands in rehearsals:
        # The few responses of a short rehearsal leave steps without a group in which only some are right.
        wanted = sizes.steps if sizes is WHOLE else 1
        if (seen := compare.steps_with_gradient(commands.run)) < wanted:
            wrong.append(f"{seen} steps, not {wanted}, have a gradient that is not zero")
    print("\n".join(["--- " + line for line in (*differing, *wrong)]))
    print(compare.format_table(compare.table(rehearsals[0])))
    twice = (compare.repeated([commands.place / f"{name}.log" for name in ("generate", "grade")]) for commands in rehearsals)
    result = {
        "minutes": round((time.monotonic() - started) / 60, 1),
        "steps": steps_done(rehearsals[0].run),
        "checkpoints_evaluated": len(compare.table(rehearsals[0])) - 1,
        "evaluated_twice": sum(twice),
        "kills_survived": len(kills),
        "same_table": not differing,
        "wildcard_listeners": len(listeners.found),
        "left_processes": left,
    }
    print(json.dumps(result))
    good = result["steps"] == sizes.steps and not wrong and not differing and listeners.looks
    return 0 if good and not (result["evaluated_twice"] or result["wildcard_listeners"] or left) else 1


if __name__ == "__main__":
    sys.exit(main())
