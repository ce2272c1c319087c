"""`megatron-aspo plan-sync` over the committed configs, against the sizes that transformers gives these models."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_aspo.cli import main
from tests.in_process import run_main

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "examples/models"


def plan(*arguments: str) -> subprocess.CompletedProcess:
    return run_main(main, "plan-sync", *arguments, cwd=ROOT)


LAYOUTS = [
    ("qwen2.5-1.5b", "tensor=2 pipeline=2 data=2", 16, 1),
    ("qwen3-30b-a3b", "tensor=4 pipeline=2 data=4 expert=8 expert_tensor=1", 8, 4),
    ("llama-3.1-405b", "tensor=8 pipeline=18 data=2", 2, 8),
]


@pytest.mark.parametrize(("model", "train", "engines", "tensor"), LAYOUTS, ids=[layout[0] for layout in LAYOUTS])
def test_every_engine_receives_the_model_once_and_links_determine_the_seconds(model, train, engines, tensor):
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODELS / model)).num_parameters()
    arguments = [str(MODELS / model), "--train", *train.split(), "--engines", str(engines), "--engine-tensor", str(tensor)]
    slow, fast = (json.loads(plan(*arguments, "--between-gb-s", speed, "--within-gb-s", "1e9").stdout) for speed in ("1", "4"))
    assert slow["bytes_over_bound"] == 1.0
    # Every worker has its own copy of what is not sharded: norms, routers, and biases of replicated heads.
    assert engines * parameters * 2e-9 <= slow["gb"] * (1 + 1e-3) <= engines * parameters * 2e-9 * 1.02
    # No plan can balance stages of which the first has the embedding too: 18 of 7 layers, 2.1 of 405.9 billion parameters.
    assert slow["out_busiest_over_mean"] <= (1.09 if model == "llama-3.1-405b" else 1.05)
    assert slow["in_gb_busiest"] * engines * tensor >= slow["gb"] * 0.999
    assert slow["seconds"] == pytest.approx(4 * fast["seconds"], rel=1e-2)
    # Engines fill separate nodes: a node with several engines receives what it needs once.
    assert slow["between_nodes_gb"] == pytest.approx(parameters * 2e-9 * engines * tensor / 8, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere/config.json cannot be read"),
        (["qwen2.5-1.5b", "--train", "tensor=3"], "trainer.tensor_parallel=3 does not divide"),
        (["qwen2.5-1.5b", "--train", "sideways=2"], "--train sideways=2: expected AXIS=NUMBER"),
        (["qwen2.5-1.5b", "--train", "tensor=0"], "--train tensor=0: expected AXIS=NUMBER"),
        (["qwen2.5-1.5b", "--engines", "0"], "--engines: 0 is not a whole number from 1"),
        (["qwen2.5-1.5b", "--engine-tensor", "5"], "rollout.tensor_parallel=5 does not divide"),
        (["llama-3.1-405b", "--train", "pipeline=16"], "trainer.pipeline_parallel=16"),
        (["qwen2.5-1.5b", "--colocated", "--engines", "2"], "2 engine workers cannot share the devices of 1 training ranks"),
        (["qwen2.5-1.5b", "--dtype", "float99"], "'float99' is not an element type"),
        (["qwen2.5-1.5b", "--between-gb-s", "0"], "--between-gb-s: 0 is not a number above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_plans_are_refused(arguments, message):
    result = plan(str(MODELS / arguments[0]), *arguments[1:])
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
