"""rollout/'s account of vLLM's layout, which planning and training ranks import."""

import subprocess
import sys

import pytest

from megatron_aspo.rollout.engine_layout import EngineHoldings, EngineSizes
from tests.unit.test_layout import dims


def test_the_layout_of_engines_and_the_transfer_spec_import_neither_torch_nor_vllm():
    code = "import sys, megatron_aspo.rollout.transfer_spec; print(sorted({'torch', 'vllm', 'ray'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("tensor", "boxes", "workers"),
    [
        # 6 heads and 3 key-value heads of 4 rows on 6 workers: each key-value head is on two of them.
        ("model.layers.0.self_attn.q_proj.weight", [(4 * i, 4 * i + 4) for i in range(6)], [(i,) for i in range(6)]),
        ("model.layers.0.self_attn.k_proj.weight", [(0, 4), (4, 8), (8, 12)], [(0, 1), (2, 3), (4, 5)]),
        # 150 rows, padded to 192, 32 for each worker: the last one holds padding only.
        ("lm_head.weight", [(0, 32), (32, 64), (64, 96), (96, 128), (128, 150)], [(0,), (1,), (2,), (3,), (4,)]),
        ("model.norm.weight", [(0, 24)], [(0, 1, 2, 3, 4, 5)]),
    ],
    ids=["heads", "replicated heads", "padded vocabulary", "norm"],
)
def test_workers_hold_the_rows_that_vllm_documents(tensor, boxes, workers):
    d = dims(heads=6, kv_heads=3, head_dim=4, hidden=24, ffn=24, vocab=150)
    owners = EngineHoldings("LlamaForCausalLM", d, EngineSizes(6)).of(tensor)
    assert [box[0] for box in owners.boxes] == boxes
    assert list(owners.ranks) == workers
