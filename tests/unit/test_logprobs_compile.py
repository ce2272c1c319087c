"""Triton's kernels compile for GPUs that this machine lacks; running them needs one (tests/gpu)."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_aspo.trainer.logprobs_triton import _gradient, _statistics

constants = {"temperature": 0.7, "BLOCK": 4096}

def compile(kernel, signature, capability, constants):
    signature = signature | {name: "constexpr" for name in constants}
    target = GPUTarget("cuda", capability, 32)
    assert triton.compile(ASTSource(kernel, signature, constants), target=target, options={"num_warps": 8}).asm["cubin"]

for capability in (80, 90):
    for dtype in ("*bf16", "*fp32"):
        ends = {"columns": "i32", "temperature": "", "BLOCK": ""}
        statistics = {"logits": dtype, "targets": "*i64", "found": "*fp32", "tokens": "i32"} | ends
        compile(_statistics, statistics, capability, constants)
        gradient = {"logits": dtype, "targets": "*i64"} | dict.fromkeys(("peak", "offset", "slope", "at_target"), "*fp32") | ends
        compile(_gradient, gradient, capability, constants)
        compile(_gradient, gradient, capability, constants | {"slope": None})
print("compiled")
"""


def test_the_kernels_compile_for_ampere_and_hopper(tmp_path):
    subprocess.run(["bash", ROOT / "tools" / "maintain" / "setup_triton.sh"], check=True)
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / '.venv' / 'triton'}", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, script], env=os.environ | environment, capture_output=True, text=True)
    assert done.stdout == "compiled\n", done.stderr
