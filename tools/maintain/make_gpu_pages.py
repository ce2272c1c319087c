"""Write into the pages what has run on a GPU and what has not, from docs/gpu_results.json: python tools/maintain/make_gpu_pages.py

The pages are the README's sentence and table, the list in docs/README.md, and the first line and the results of docs/gpu.md.
tools/prove/gpu_check.py --write puts its cases into docs/gpu_results.json and calls this. A part counts as run when every case
named for it passed on a card, at full size.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("docs/gpu_results.json")
MARK = "<!-- written by tools/maintain/make_gpu_pages.py -->"
"""Stands alone on a line before and after each text of docs/."""
SENTENCE = re.compile(r"^\*\*(Nothing has|Parts have) run on .*?\*\*", re.MULTILINE)
"""The README's sentence. It has no mark because a mark in its line would keep code hosts from showing it in bold."""
TABLE = "| part | tested on CPU | run on a GPU |"
"""The header of the README's table, which ends at the next empty line."""
ABOUT = ("card", "commit", "date", "versions")
"""The commit, card and versions that all results of one run share."""
NOT_FIGURES = ("section", "case", "passed", "seconds", "small", "profile", *ABOUT)


@dataclass(frozen=True)
class Part:
    """A feature that runs on a GPU."""

    words: str
    cases: tuple[str, ...] = ()
    """`section/beginning of a case` of tools/prove/gpu_check.py; all must have passed. Empty: a check on one card cannot show it."""


ENGINE_LAYERS = Part("Transformer Engine layers and its fused optimizer", ("trainer/transformer_engine bfloat16",))
FP8 = Part("FP8", ("trainer/transformer_engine fp8",))
TRITON = Part("Triton kernels of the log-probabilities", ("logprobs/",))
CUDA_IPC = Part("CUDA IPC", ("parking/weights to another process by CUDA IPC",))
PARKING = Part("memory that leaves and comes back", ("parking/leave and come back",))
STEP = Part("one step of a small Qwen2", ("trainer/local bfloat16",))
NCCL = Part("NCCL")
STATUS: list[tuple[str, str, tuple[Part, ...]]] = [
    (
        "Llama, Mistral, Qwen2 and 2.5, Qwen3, Qwen3-MoE, Mixtral, Seed-OSS; others are refused",
        "small random weights; SmolLM2-135M (Llama)",
        (STEP,),
    ),
    ("tensor, sequence, pipeline, interleaved, context, data and expert parallelism, combined", "up to 8 ranks", ()),
    ("weight sync", "shared memory and gloo", (CUDA_IPC, NCCL)),
    ("checkpoints, bit-identical resume, conversion to and from Hugging Face and Megatron-Core's `torch_dist`", "yes", ()),
    (
        "ranks and engines that time-share devices (`placement: colocated`)",
        "runs, but frees no memory on CPU",
        (PARKING, Part("whole runs")),
    ),
    ("Triton kernels of the log-probabilities", "in Triton's interpreter", (TRITON,)),
    ("Transformer Engine layers, FP8, fused optimizers", "no", (ENGINE_LAYERS, FP8)),
    ("several nodes", "two network namespaces of one machine", ()),
]
"""Rows of the README's table: the feature, what was tested on CPU, and its parts on a GPU."""
UNPROVEN = [
    Part("NCCL process groups and transfers"),
    Part("the Transformer Engine layer spec with its parameter names, and its fused optimizer", ENGINE_LAYERS.cases),
    Part("FP8", FP8.cases),
    Part("the fused optimizer of apex"),
    Part(
        "the Triton kernels of the log-probabilities (their results are compared with float64 in Triton's interpreter, and they compile "
        "for Ampere and Hopper)",
        TRITON.cases,
    ),
    Part("moves to and from pinned memory", PARKING.cases),
    Part("weights that reach another process through CUDA IPC", CUDA_IPC.cases),
    Part("engines on CUDA, with sleep and wake and new weights", ("engines/",)),
    Part("whole runs, with engines that share the trainer's GPUs or have their own"),
    Part("expert-parallel engines"),
    Part("the `gpu` extra of `setup.py` and its lock, `tools/locks/gpu-py312.txt`, which resolve (`tools/maintain/make_locks.py`)"),
    Part("runs over several nodes"),
]
"""The list of docs/README.md while nothing has run."""


def has_run(part: Part, entries: list[dict]) -> bool:
    """Whether all cases of the part passed on a card."""
    named = [[entry for entry in entries if f"{entry['section']}/{entry['case']}".startswith(case)] for case in part.cases]
    return bool(named) and all(found and all(entry["passed"] is True and _counts(entry) for entry in found) for found in named)


def _cards(entries: list[dict]) -> str:
    """Return the names of the cards that some case ran on."""
    return " and ".join(sorted({entry["card"] for entry in entries if _counts(entry)}))


def _counts(entry: dict) -> bool:
    return not entry["small"] and entry["card"] != "cpu"


def status_table(entries: list[dict]) -> str:
    """Return the README's table."""
    rows = [TABLE, "|---|---|---|"]
    for name, on_cpu, parts in STATUS:
        missing = [part.words for part in parts if not has_run(part, entries)]
        cell = "not yet"
        if len(missing) < len(parts):
            done = [part.words for part in parts if has_run(part, entries)]
            cell = f"{' and '.join(done)}: yes" + (f"; {' and '.join(missing)}: not yet" if missing else "")
        rows.append(f"| {name} | {on_cpu} | {cell} |")
    return "\n".join(rows)


def sentence(entries: list[dict]) -> str:
    """Return the sentence on GPUs near the beginning of the README."""
    cards = _cards(entries)
    if not cards:
        return "**Nothing has run on a GPU yet: what is tested was tested on CPU, see [status](#status).**"
    return f"**Parts have run on {cards} ([results](docs/gpu.md#results)), the rest on CPU alone, see [status](#status).**"


def unproven(entries: list[dict]) -> str:
    """Return the list of parts that have not run on a GPU."""
    words = [part.words for part in UNPROVEN if not has_run(part, entries)]
    return "".join(f"- {line};\n" for line in words[:-1]) + f"- {words[-1]}.\n"


def introduction(entries: list[dict]) -> str:
    """Return the first line of docs/gpu.md."""
    cards = _cards(entries)
    return f"Parts of the check have run on {cards} ([results](#results)).\n" if cards else "No CUDA code has run on a GPU yet.\n"


def results(entries: list[dict]) -> str:
    """Return the results of docs/gpu.md: a table for each commit, card and set of versions."""
    if not entries:
        return "None yet.\n"
    runs: dict[str, list[dict]] = {}
    for entry in entries:
        runs.setdefault(json.dumps([entry[key] for key in ABOUT]), []).append(entry)
    return "\n".join(_run(found) for found in runs.values())


def _run(found: list[dict]) -> str:
    shared = found[0]
    versions = ", ".join(f"{name} {version}" for name, version in shared["versions"].items())
    lines = [f"{shared['card']}, commit {shared['commit']}, {shared['date']}; {versions}:", ""]
    lines += ["| section | case | result | figures |", "|---|---|---|---|"]
    for entry in found:
        result = {True: "passed", False: "FAILED", None: "skipped"}[entry["passed"]]
        figures = ", ".join(f"{name} {_figure(value)}" for name, value in entry.items() if name not in NOT_FIGURES)
        lines.append(f"| {entry['section']} | {_escaped(entry['case'])} | {result} | {_escaped(figures)} |")
    return "\n".join(lines) + "\n"


def _figure(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def pages(root: Path, entries: list[dict]) -> dict[Path, str]:
    """Return path → new text of the three pages, from those under `root`. Raises ValueError where the marks are missing."""
    gpu, manual, readme = (root / name for name in ("docs/gpu.md", "docs/README.md", "README.md"))
    text, sentences = SENTENCE.subn(sentence(entries), readme.read_text(encoding="utf-8"))
    before, head, after = text.partition(TABLE)
    if sentences != 1 or not head:
        raise ValueError(f"{readme} should have one sentence {SENTENCE.pattern} and the table {TABLE}")
    return {
        gpu: _between(gpu, introduction(entries), results(entries)),
        manual: _between(manual, unproven(entries)),
        readme: before + status_table(entries) + after[after.index("\n\n") :],
    }


def _between(page: Path, *texts: str) -> str:
    """Return the page with the texts between its pairs of marks."""
    parts = page.read_text(encoding="utf-8").split(MARK)
    if len(parts) != 2 * len(texts) + 1:
        raise ValueError(f"{page} should have {2 * len(texts)} marks {MARK}, it has {len(parts) - 1}")
    parts[1::2] = [f"\n{text}" for text in texts]
    return MARK.join(parts)


def write(root: Path = ROOT) -> None:
    """Write the pages under `root` from the results there."""
    entries = json.loads((root / RESULTS).read_text(encoding="utf-8"))
    for page, text in pages(root, entries).items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
