"""Finds the names that a run can write to `metrics.jsonl`, by running the real loop with stand-ins for the processes.

The loop (train.py), the collector, the rollout metrics and the objective are the real ones; engines, reward workers and training ranks are
stand-ins. The names that a training rank adds to its report are read from the source of trainer/update.py: importing it needs Megatron.
"""

import ast
import itertools
import sys
import tempfile
from concurrent.futures import Future
from pathlib import Path
from unittest.mock import MagicMock, patch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from megatron_aspo import train as loop  # noqa: E402
from megatron_aspo.config import Config  # noqa: E402
from megatron_aspo.data.packing import PackingMetrics  # noqa: E402
from megatron_aspo.data.records import Generation, Prompt, VersionSpan  # noqa: E402
from megatron_aspo.evaluation.options import EvaluationOptions  # noqa: E402
from megatron_aspo.losses.aggregation import Totals  # noqa: E402
from megatron_aspo.losses.objective import Objective, ObjectiveTokens  # noqa: E402
from megatron_aspo.losses.options import AlgorithmOptions  # noqa: E402
from megatron_aspo.losses.tally import Tally  # noqa: E402
from megatron_aspo.rewards.result import RewardResult  # noqa: E402
from megatron_aspo.rollout.collector import Rollouts  # noqa: E402
from megatron_aspo.rollout.options import RolloutOptions  # noqa: E402
from megatron_aspo.runtime.run import Run  # noqa: E402
from megatron_aspo.trainer.settings import UpdateReport  # noqa: E402

UPDATE = ROOT / "megatron_aspo" / "trainer" / "update.py"


def update_names() -> dict[str, list[str]]:
    """Return the names that trainer/update.py itself adds: in the `tally`, in the `mismatch`, and phases whose `seconds` it measures."""
    found: dict[str, list[str]] = {"tally": [], "mismatch": [], "seconds": []}
    for node in ast.walk(ast.parse(UPDATE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Subscript) and ast.unparse(target.value) == "tally":
            found["tally"].append(ast.literal_eval(target.slice))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "_timed":
            found["seconds"].append(ast.literal_eval(node.args[1]))
        elif isinstance(node, ast.FunctionDef) and node.name == "_mismatch":
            for part in ast.walk(node):
                if isinstance(part, ast.Dict):
                    found["mismatch"] += [ast.literal_eval(key) for key in part.keys]
    if missing := [kind for kind, names in found.items() if not names]:
        raise LookupError(f"{UPDATE} no longer names its metrics of kind {missing} as this tool expects: change update_names")
    return found


def objective_tally() -> Tally:
    """Return the tally of a micro-batch that has tokens of every kind: both signs of the advantage, and a reference policy."""
    values = torch.full((4,), -1.0)
    tokens = ObjectiveTokens(
        logprobs=values.clone().requires_grad_(),
        entropy=torch.ones(4),
        old_logprobs=values,
        rollout_logprobs=values,
        ref_logprobs=values,
        advantages=torch.tensor([1.0, 1.0, -1.0, -1.0]),
        mask=torch.ones(4, dtype=torch.bool),
        offsets=[0, 2, 4],
        names=("a", "b"),
    )
    return Objective(AlgorithmOptions())(tokens, Totals(tokens=4, responses=2, full_responses=2, max_response_tokens=2))[1]


def full_report() -> UpdateReport:
    """Return the report of a step in which every metric is present."""
    own = update_names()
    return UpdateReport(
        tally=objective_tally() | dict.fromkeys(own["tally"], (1.0, 1)),
        mismatch=dict.fromkeys(own["mismatch"], 0.0),
        gradient_norms=[1.0],
        seconds=dict.fromkeys(own["seconds"], 1.0),
        packing=PackingMetrics(),
        tokens=8,
    )


def stand_in(config: Config, directory: Path) -> MagicMock:
    """Return a `Run` with a real collector and stand-ins for its processes."""
    prompt = Prompt("p", (1, 2), "question", 1, "stand-in")

    def stream(requests, group_size):
        one = np.zeros(2, np.float32)
        for position in range(len(requests)):
            yield position, Generation(one.astype(np.int32), one, (VersionSpan(0, 0, 2),), "stop")

    def generate(requests, group_size, on_response):
        generations = [generation for _, generation in stream(requests, group_size)]
        for position, generation in enumerate(generations):
            on_response(position, generation)
        return generations

    def submit(prompt, response):
        future = Future()
        future.set_result(RewardResult(float(next(scored) % 2), "stand-in", {"parts": {"NAME": 1.0}}))
        return future

    scored = itertools.count()
    task, engines, rewards, tokenizer = MagicMock(), MagicMock(), MagicMock(), MagicMock()
    task.prompt.return_value, task.held_out.return_value = prompt, [prompt, prompt]
    engines.generate.side_effect, engines.stream.side_effect = generate, stream
    tokenizer.decode.return_value = "text"
    rewards.submit.side_effect = submit
    rewards.take_losses.return_value = []
    parts = {"task": task, "engines": engines, "rewards": rewards, "tokenizer": tokenizer}
    run = MagicMock(config=config, directory=directory, memory=None, **parts)
    run.evaluate.side_effect = lambda phase: Run.evaluate(run, phase)
    run.start.step = 0
    run.publisher.version = 0
    run.rollouts = Rollouts(task, engines, rewards, tokenizer, config.rollout, config.algorithm, config.seed, log=MagicMock())
    run.trainers.world = 1
    run.trainers.update.return_value = full_report()
    run.placement.to_generating.return_value = 0
    run.evaluation_path.side_effect = lambda done: directory / f"step_{done}.json"
    return run


def metric_names() -> list[str]:
    """Return every name, in the order in which a step writes them."""
    config = Config(
        model="model",
        task="dataset",
        steps=2,
        rollout=RolloutOptions(prompts_per_step=2, responses_per_prompt=2, max_response_tokens=2),
        evaluation=EvaluationOptions(draws=2, every=1),
    )
    with tempfile.TemporaryDirectory() as directory:
        run = stand_in(config, Path(directory))
        opened = MagicMock()
        opened.return_value.__enter__.return_value = run
        with patch.multiple(loop, open_run=opened, print_summary=MagicMock(), model_card=MagicMock(), write_rollouts=MagicMock()):
            loop.train(config)
    lines = [call.args[0] for call in run.record.call_args_list]
    return list(dict.fromkeys(name for line in lines for name in line))
