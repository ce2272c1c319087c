"""Measure the math reward against math-verify in this process: .venv/bin/python tools/bench/bench_math_reward.py [--verdicts N]

One reward worker's process grades N responses; 1 in 100 has an answer that stalls other graders: towers of powers, a hundred kilobytes of
braces, and, 1 in 10 of these, a sum on which math-verify is killed at `data.math.limit_s`. math-verify grades ordinary responses, with its
own limits on. Every verdict of the reward is compared with the known one. Prints one JSON object:

    {"math_over_inprocess": ratio of ordinary verdicts per second, "leaked_processes": …, "verdicts_per_s": over all, the slow ones too,
     "ordinary_per_s": …, "inprocess_per_s": …, "inprocess_wrong": its wrong verdicts, "inprocess_verdicts": …, "grown_mib": memory that
     the process gained over the last nine tenths, "killed": comparisons killed at their limit, "verdicts": …}
"""

import argparse
import json
import logging
import os
import random
import sys
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards.math.options import MathOptions
from megatron_aspo.rewards.process import RewardProcess
from megatron_aspo.tasks.options import DataOptions

LIMIT_S = 0.5
BATCH = 50
HUNG = r"\sum_{k=1}^{10^9} \sin(k^k)"
HELD_UP = (
    "9^{9^{9^9}}",
    r"\dfrac{5^{5^{5^{5^5}}-4}-5}{16}",
    "((((9!)!)!)!)!",
    "{" * 100_000,
    r"\frac{" * 500 + "1" + "}" * 500,
    "2^{" * 30 + "2" + "}" * 30,
    "9" * 100_000,
    r"\binom{10^{50}}{10^{49}}",
    "(x+1)^{100000}",
)
Row = tuple[str, str, bool]
"""(answer, ground truth, whether they are equal)"""


def ordinary(choose: random.Random) -> Row:
    """Return an answer like those of competition mathematics, right or wrong."""
    a, b, c = choose.randrange(2, 200), choose.randrange(2, 60), choose.randrange(2, 12)
    rows: list[Row] = [
        (f"{a}", f"{a}", True),
        (f"{a}", f"{a + b}", False),
        (f"{a}.0", f"{a}", True),
        (rf"\frac{{{a * c}}}{{{b * c}}}", rf"\frac{{{a}}}{{{b}}}", True),
        (f"{a}/{b}", rf"\frac{{{a}}}{{{b}}}", True),
        (rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{a + b}}}{{{b}}}", False),
        (rf"{c}\sqrt{{{b}}}", rf"\sqrt{{{b * c * c}}}", True),
        (rf"\sqrt{{{a}}}", rf"\sqrt{{{a + 1}}}", False),
        (f"x^2+{a}x+{b}", f"{b}+x^2+{a}x", True),
        (f"(x+{a})(x+{b})", f"x^2+{a + b}x+{a * b}", True),
        (f"x+{a}", f"x+{a + 1}", False),
        (f"({a}, {b})", f"({a},{b})", True),
        (f"{a + b}, {a}", f"{a}, {a + b}", True),
        (f"[{b}, {a + b}]", f"[{b},{a + b})", False),
        (rf"{a}\pi", rf"\pi \cdot {a}", True),
        (rf"{a}\%", f"{a / 100}", True),
        (rf"{a}\text{{ cm}}", f"{a}", True),
        (rf"\begin{{pmatrix}} {a} \\ {b} \end{{pmatrix}}", rf"\begin{{pmatrix}} {a} \\ {b} \end{{pmatrix}}", True),
        (rf"\{{{a}, {a + b}\}}", rf"\{{{a + b}, {a}\}}", True),
        (rf"2^{{{b}}}", rf"2^{{{b + 1}}}", False),
    ]
    return choose.choice(rows)


def grade(process: RewardProcess, rows: list[Row]) -> int:
    """Grade the rows in batches and compare every verdict; return how many comparisons were killed at their limit."""
    killed = 0
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        batch = [(Prompt("p", (), "", gold, "math"), f"So it is \\boxed{{{answer}}}.") for answer, gold, _ in part]
        for row, result in zip(part, process.score(batch), strict=True):
            killed += "took more than" in result.reason
            if result.failure or result.score != float(row[2]):
                raise SystemExit(f"error: a wrong verdict: {result} on {row[0][:80]}, {row[1][:80]}")
    return killed


def in_process(rows: list[Row]) -> tuple[float, int]:
    """Return the seconds that math-verify takes for the rows in this process, and the number of its wrong verdicts."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    parse("\\boxed{1}")
    wrong, started = 0, time.monotonic()
    for answer, gold, equal in rows:
        wrong += verify(parse(f"\\boxed{{{gold}}}"), parse(f"So it is \\boxed{{{answer}}}.")) is not equal
    return time.monotonic() - started, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--verdicts", type=int, default=50_000, help="how many responses are graded")
    parser.add_argument("--ordinary", type=int, default=2000, help="how many ordinary ones are graded by both")
    options = parser.parse_args()
    choose = random.Random(31)
    plain = [ordinary(choose) for _ in range(options.ordinary)]
    rows = []
    for number in range(options.verdicts):
        slow = HUNG if number % 1000 == 99 else HELD_UP[number // 100 % len(HELD_UP)]
        rows.append((slow, "1", False) if number % 100 == 99 else ordinary(choose))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    process = RewardProcess("dataset", DataOptions(reward="math", math=MathOptions(limit_s=LIMIT_S), reward_timeout_s=30.0), os.getcwd())
    process.start()
    (child,) = (one for one in psutil.Process().children() if one.pid not in before)
    try:
        grade(process, [*plain[:100], (HUNG, "1", False)])
        started = time.monotonic()
        grade(process, plain)
        ours = len(plain) / (time.monotonic() - started)
        started, tenth = time.monotonic(), len(rows) // 10
        killed = grade(process, rows[:tenth])
        memory = child.memory_info().rss
        killed += grade(process, rows[tenth:])
        seconds, grown = time.monotonic() - started, child.memory_info().rss - memory
        left = len(child.children(recursive=True))
    finally:
        process.close()
    left += sum(one.pid not in before for one in psutil.Process().children(recursive=True))
    theirs, wrong = in_process(plain)
    result = {
        "math_over_inprocess": round(ours * theirs / len(plain), 2),
        "leaked_processes": left,
        "verdicts_per_s": round(len(rows) / seconds, 1),
        "ordinary_per_s": round(ours, 1),
        "inprocess_per_s": round(len(plain) / theirs, 1),
        "inprocess_wrong": wrong,
        "inprocess_verdicts": len(plain),
        "grown_mib": round(grown / 2**20, 1),
        "killed": killed,
        "verdicts": len(rows),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
