"""Freed memory stays resident or returns to the system, measured in fresh processes."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
from pathlib import Path
from megatron_aspo.common.host_memory import keep_freed_memory, release_freed_memory

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

if sys.argv[1] == "kept":
    keep_freed_memory()
before = resident_mb()
blocks = [b"x" * (40 << 20) for _ in range(5)]
last = b"x" * 100_000  # the heap does not end with a free block
del blocks
print(resident_mb() - before)
release_freed_memory()
print(resident_mb() - before)
"""


@pytest.mark.parametrize(("mode", "kept"), [("kept", True), ("as glibc does", False)])
def test_freed_memory_is_kept_when_enabled_and_returned_when_released(mode, kept):
    output = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True).stdout
    freed, released = map(float, output.split())
    assert (freed > 150) == kept
    assert released < 50
