"""`megatron-aspo verify-sync`: prove the weight sync of a recipe, on its own model and layouts, before a run is trusted to it.

Training ranks load the recipe's model, engines start with random weights, and the weights are published. Then every number is compared with
the model's files, each tensor of which is cast to the trainer's type and then to the engines':
- the SHA-256 of each piece that a worker received, and of everything that lies in its memory afterwards, in engines that keep weights
  readable;
- the logprobs of sampled tokens with a float32 forward of transformers, in engines as a run has them: to 1e-4 if those are float32.

The last line is one JSON object: pieces received and boxes read back, tensors that no engine can show (`unreadable`: on GPUs the experts,
whose layout is their kernels'), the largest error of a logprob. The exit status is 1 when anything differs; each difference is printed.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_aspo.config import Config, load_config
from megatron_aspo.rollout.engine import Request
from megatron_aspo.rollout.pool import EnginePool
from megatron_aspo.runtime.checks import CheckedRecipe, check_recipe, check_run, expected_device
from megatron_aspo.runtime.cluster import Cluster, open_cluster
from megatron_aspo.runtime.processes import transfer_spec
from megatron_aspo.runtime.publisher import Publisher
from megatron_aspo.runtime.trainers import Trainers
from megatron_aspo.sync.messages import sha256_of
from megatron_aspo.weights.layout import format_box, slices

TOLERANCE = 1e-4
PROMPTS, PROMPT_TOKENS, RESPONSE_TOKENS = 4, 40, 24


def run_verify_sync(parsed: argparse.Namespace) -> int:
    """Print each difference, then the metrics as one JSON object; return the exit status. Raises UserError for a recipe that cannot run."""
    config = load_config(parsed.recipe, parsed.overrides)
    checked = check_run(config, expected_device(config)).in_hugging_face_format()
    cluster = open_cluster(config.ray_address, 64, config.rollout.sizes)
    try:
        metrics, differences = verify(config, checked, cluster)
    finally:
        cluster.close()
    for difference in differences:
        print(difference)
    print(json.dumps(metrics | {"differences": len(differences)}))
    return int(bool(differences))


def verify(config: Config, checked: CheckedRecipe, cluster: Cluster) -> tuple[dict, list[str]]:
    """Publish the recipe's weights to engines that hold others; return metrics and what differs."""
    described, settings, model = checked.model, checked.settings, checked.model.directory
    check_recipe(config, described, settings, cluster.device)
    spec = transfer_spec(config, described, settings)
    expected = read_expected(model, [config.trainer.dtype, config.rollout.dtype])
    expected = {name: expected[name] for name in described.tensor_shapes}
    differences: list[str] = []
    metrics: dict = {"tensors": len(expected), "training_ranks": settings.sizes.world, "engine_workers": spec.engines.world}
    trainers = Trainers.start(settings, cluster.device, config.trainer.threads or 1, None, False)
    try:
        with tempfile.TemporaryDirectory() as other:
            save_random_model(model, Path(other))
            for readable in (True, False):
                engines = EnginePool(other, config.rollout, PROMPT_TOKENS + RESPONSE_TOKENS, cluster.device, readable=readable)
                try:
                    engines.start()
                    Publisher(trainers, engines, spec, config.trainer.timeout_s, verify_every=1).publish(1)
                    if readable:
                        metrics |= compare_digests(expected, engines, differences)
                    else:
                        metrics["logprob_error"] = measure_logprob_error(config, model, engines)
                finally:
                    engines.shutdown()
    finally:
        trainers.close()
    if config.rollout.dtype == "float32" and not metrics["logprob_error"] <= TOLERANCE:
        differences.append(f"logprobs differ by {metrics['logprob_error']:.3g}, more than {TOLERANCE}")
    return metrics, differences


def read_expected(directory: Path, dtypes: list[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's files, cast to one type after the other."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                value = tensors.get_tensor(name)
                for dtype in dtypes:
                    value = value.to(getattr(torch, dtype))
                found[name] = value
    return found


def save_random_model(model: Path, directory: Path) -> None:
    """Save a model of the same config with random weights."""
    config = AutoConfig.from_pretrained(model)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)


def compare_digests(expected: dict[str, torch.Tensor], engines: EnginePool, differences: list[str]) -> dict:
    """Compare what engines received and hold with the files; return counts of pieces, and add each difference to `differences`."""
    metrics = {}
    for what, found in (("received", engines.received_digests()), ("stored", engines.stored_digests())):
        metrics[what] = sum(len(boxes) for workers in found for boxes in workers)
        for number, workers in enumerate(found):
            differences += [f"{what}, engine {number} {difference}" for difference in _differing(expected, workers)]
            differences += [f"{what}, engine {number}: parts of {name} are missing" for name in _incomplete(expected, workers)]
            unseen = sorted(set(expected) - {tensor for boxes in workers for tensor, _, _ in boxes})
            if what == "received":
                differences += [f"received, engine {number}: {name} is missing" for name in unseen]
            else:
                metrics["unreadable"] = max(metrics.get("unreadable", 0), len(unseen))
    return metrics


def _differing(expected: dict[str, torch.Tensor], workers: list[list]) -> Iterator[str]:
    """Yield the workers' (tensor, box, SHA-256) entries that differ from the files."""
    for number, boxes in enumerate(workers):
        for tensor, box, found in boxes:
            if sha256_of(expected[tensor][slices(box)]).hex() != found:
                yield f"worker {number}: {tensor} {format_box(box)}"


def _incomplete(expected: dict[str, torch.Tensor], workers: list[list]) -> Iterator[str]:
    """Yield the tensors of which the workers of one engine have some elements but not all."""
    entries = [entry for boxes in workers for entry in boxes]
    covered = {name: torch.zeros(expected[name].shape, dtype=torch.bool) for name, _, _ in entries}
    for tensor, box, _ in entries:
        covered[tensor][slices(box)].fill_(True)
    yield from (name for name, here in covered.items() if not here.all())


def measure_logprob_error(config: Config, model: Path, engines: EnginePool) -> float:
    """Return the largest distance between the engines' logprobs and those of transformers in float32."""
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    generator = np.random.default_rng(0)
    requests = [
        Request(
            f"verify {number}",
            tuple(generator.integers(10, oracle.config.vocab_size, PROMPT_TOKENS).tolist()),
            number,
            RESPONSE_TOKENS,
            1.0,
        )
        for number in range(PROMPTS * config.rollout.engines)
    ]
    worst = 0.0
    for request, generation in zip(requests, engines.generate(requests), strict=True):
        ids = torch.tensor([[*request.prompt_ids, *generation.token_ids.tolist()]])
        with torch.inference_mode():
            logprobs = oracle(ids).logits[0, PROMPT_TOKENS - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, ids[0, PROMPT_TOKENS:, None])[:, 0].numpy()
        worst = float(np.maximum(worst, np.abs(generation.logprobs - expected).max()))  # NaN is kept
    return worst
