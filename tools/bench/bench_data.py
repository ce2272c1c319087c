"""Measure the memory and start-up time that a large code dataset adds to a run:

    python tools/bench/bench_data.py [--gb 2] [--format parquet|jsonl|array]

Writes two datasets in the layout that Archer's training script reads, with rows of 0.4 MB (Archer2.0's mean), almost all of it tests: one
of --gb and one of 2 MB. Trains one step of the quickstart on each alternately, --rounds times, with the code reward; the last line is one
JSON object of medians:

- `extra_peak_mb`: peak memory of all processes with the large set less that with the small one (shared pages count once);
- `extra_start_s`: the same difference of the seconds from the command to the first responses;
- `large` and `small`: both values for either set.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from megatron_aspo.observe.memory import PeakMemory  # noqa: E402
from megatron_aspo.runtime.cluster import computes_bfloat16  # noqa: E402

MODEL = ROOT / "models" / "smollm2-135m-instruct"
ROW_BYTES = 400_000
TESTS = 20


def row(number: int) -> dict:
    """Return a problem whose tests have long random inputs, which hardly compress."""
    draw = random.Random(number)
    inputs = [draw.randbytes(ROW_BYTES // TESTS // 2).hex() + "\n" for _ in range(TESTS)]
    outputs = [f"{text.count('a')}\n" for text in inputs]
    return {
        "data_source": "code",
        "prompt": [{"role": "user", "content": f"Problem {number}: print how often the letter a is in the input."}],
        "reward_model": {"style": "rule", "ground_truth": json.dumps({"inputs": inputs, "outputs": outputs})},
        "extra_info": {"index": number},
    }


def write(path: Path, rows: int, kind: str) -> None:
    if kind == "parquet":
        # Large row groups, as in published datasets.
        schema = pa.Table.from_pylist([row(0)]).schema
        with parquet.ParquetWriter(path, schema) as writer:
            for first in range(0, rows, 500):
                writer.write_table(pa.Table.from_pylist([row(number) for number in range(first, min(rows, first + 500))], schema=schema))
        return
    with path.open("w") as file:
        begin, between, end = ("", "\n", "\n") if kind == "jsonl" else ("[", ",\n", "]\n")
        file.write(begin)
        for number in range(rows):
            file.write((between if number else "") + json.dumps(row(number)))
        file.write(end)


def measure(data: Path) -> dict[str, float]:
    """Return the seconds to the first responses, and the peak memory in MB, of one step on the data."""
    dtype = "bfloat16" if computes_bfloat16() else "float32"
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        words = [f"run_dir={run}", "steps=1", "evaluation.draws=0", f"trainer.dtype={dtype}", f"rollout.dtype={dtype}", "task=dataset"]
        words += [f"data.path={data}", "data.reward=code"]
        command = [sys.executable, "-m", "megatron_aspo", "train", "examples/recipes/quickstart.yaml", f"model={MODEL}", *words]
        memory, began, first = PeakMemory(every_s=0.5), time.perf_counter(), 0.0
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        while process.poll() is None:
            ledger = run / "ledger.jsonl"
            if not first and ledger.exists() and '"drawn"' in ledger.read_text():
                first = time.perf_counter() - began
            time.sleep(0.05)
        memory.close()
        if process.returncode:
            raise SystemExit(f"bench_data: error: the run ended with status {process.returncode}:\n{process.stdout.read()}")
    return {"first_token_s": first, "peak_mb": memory.gb * 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--format", choices=["parquet", "jsonl", "array"], default="parquet")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if not (MODEL / "config.json").is_file():
        parser.exit(2, f"bench_data: error: {MODEL} is missing; make it with tools/make_smollm2.py\n")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        sizes = {"large": int(options.gb * 1e9) // ROW_BYTES, "small": 5}
        for which, rows in sizes.items():
            write(Path(name) / which, rows, options.format)
        found: dict[str, list[dict[str, float]]] = {which: [] for which in sizes}
        for _ in range(options.rounds):
            for which, figures in found.items():
                figures.append(measure(Path(name) / which))
                print(which, figures[-1], flush=True)
    medians = {which: {key: statistics.median(one[key] for one in figures) for key in figures[0]} for which, figures in found.items()}
    extra = {
        "extra_peak_mb": medians["large"]["peak_mb"] - medians["small"]["peak_mb"],
        "extra_start_s": medians["large"]["first_token_s"] - medians["small"]["first_token_s"],
    }
    print(json.dumps({key: round(value, 2) for key, value in extra.items()} | medians | {"format": options.format, "gb": options.gb}))


if __name__ == "__main__":
    main()
