"""The speed tools run on the device that they are given, here at a tiny size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models import save_tiny
from tests.unit.test_packaging import ROOT, load_tool


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("tool", ["bench_train_step", "bench_logprobs"])
def test_a_missing_device_is_refused(tool: str):
    command = [sys.executable, str(ROOT / f"tools/bench/{tool}.py"), "--device", "cuda"]
    refused = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert refused.returncode == 2 and "--device cuda: torch sees no GPU here" in refused.stderr


@pytest.mark.parametrize("on", ["cpu", "cuda"])
def test_log_probabilities_are_measured_on_either_device(monkeypatch, on: str):
    """torch's CUDA functions are replaced: the test checks which are read, and that waiting comes before each clock."""
    tool = load_tool("bench_logprobs")
    calls = []
    monkeypatch.setattr(tool, "VOCAB", 500)
    monkeypatch.setattr(tool, "HIDDEN", 16)
    answers = {"synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 1000, "max_memory_allocated": 10**6}
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name, value=value: calls.append(name) or value)
    if on == "cuda":
        case = tool.inputs(8, tool.VOCAB, tool.VOCAB, "cpu")
        found = tool.measure_on_gpu(tool.ours(4, tool.VOCAB, None), case)
        assert found["extra_bytes"] == 10**6 - 1000 - 4 * 16 * (8 + 500)
        assert calls == ["synchronize", "reset_peak_memory_stats", "memory_allocated", "synchronize", "max_memory_allocated"]
    else:
        assert tool.measure(4, 1, 8, on).keys() == {"extra_bytes", "seconds", "busy"} and not calls


def test_a_training_step_is_measured(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    save_tiny("qwen2", tmp_path, tied=True, num_hidden_layers=1)
    ratios = load_tool("bench_train_step").measure(tmp_path, "float32", 1, "cpu")
    pairs = ("padded_over_transformers", "packed_over_padded", "packed_over_transformers", "shared_over_packed", "shared_over_transformers")
    assert ratios.keys() == set(pairs) and all(ratio > 0 for ratio in ratios.values())
