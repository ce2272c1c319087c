"""Write the problems of examples/recipes/laptop_math.yaml from three tasks of reasoning-gym:

    .venv/bin/python tools/maintain/make_laptop_math.py

Single-digit sums, greatest common divisors, and fractions to simplify; each with an example that shows the form of an answer. A test
computes the answers again.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_aspo.tasks.reasoning_gym import _import_package  # noqa: E402

SIZES = {"train": 40, "heldout": 10}
"""Problems of each task."""
SEED = 31
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"max_numbers": 2, "max_value": 30},
    "fraction_simplification": {"max_value": 12, "min_factor": 2, "max_factor": 4, "styles": ["plain"]},
}
EXAMPLES = {
    "chain_sum": ("State the final answer to the following arithmetic problem: 0 + 0 =", "\\boxed{0}"),
    "gcd": ("Find the Greatest Common Divisor (GCD) of these numbers: 40, 100. Give only the GCD as your final answer.", "\\boxed{20}"),
    "fraction_simplification": (
        "Simplify the fraction 70/80 to its lowest terms. Give only the simplified fraction as your final answer.",
        "\\boxed{7/8}",
    ),
}


def make() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each file; no question occurs twice, in one file or in both."""
    _import_package()
    from reasoning_gym.factory import create_dataset

    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in SIZES}
    for name, parameters in TASKS.items():
        dataset = create_dataset(name, **parameters, seed=SEED, size=1000)
        answers = dict.fromkeys((dataset[number]["question"], dataset[number]["answer"]) for number in range(1000))
        chosen = iter(answers)
        for part, count in SIZES.items():
            rows[part] += [_row(name, *next(chosen)) for _ in range(count)]
    for part in rows.values():
        random.Random(SEED).shuffle(part)
    return rows


def _row(name: str, question: str, answer: str) -> dict[str, Any]:
    shown, solved = EXAMPLES[name]
    contents = (("user", shown), ("assistant", solved), ("user", question))
    return {"data_source": name, "prompt": [{"role": role, "content": text} for role, text in contents], "ground_truth": answer}


if __name__ == "__main__":
    for part, rows in make().items():
        path = ROOT / "examples" / "data" / f"laptop_math_{part}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
