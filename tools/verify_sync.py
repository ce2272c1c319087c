"""Proves a recipe's weight sync, on its own model and layouts, before a run is trusted to it:
.venv/bin/python tools/verify_sync.py examples/recipes/quickstart.yaml trainer.pipeline_parallel=2 rollout.engines=2

Training ranks load the recipe's model, engines start with random weights, and the weights are published. Then every number is compared
with the model's files, of which each tensor is cast to the trainer's type and to the engines':
- the SHA-256 of each piece that came to a worker, and of all that lies in its memory afterwards, in engines that keep weights readable;
- the logprobs of sampled tokens with a float32 forward of transformers, in engines as a run has them: to 1e-4 if those are float32.

The last line is one JSON object: pieces received and boxes read back, tensors that no engine can show (`unreadable`: on GPUs the experts,
which lie as their kernels want them), the largest error of a logprob. The exit status is 1 when anything differs, each of which is named.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_aspo.common.errors import UserError
from megatron_aspo.config import Config, load_config
from megatron_aspo.rollout.engine import Request
from megatron_aspo.rollout.pool import EnginePool
from megatron_aspo.runtime.checks import CheckedRecipe, check_recipe, check_run, expected_device
from megatron_aspo.runtime.cluster import Cluster, open_cluster
from megatron_aspo.runtime.processes import transfer_spec
from megatron_aspo.runtime.publisher import Publisher
from megatron_aspo.runtime.trainers import Trainers
from megatron_aspo.sync.messages import digest, view, written

TOLERANCE = 1e-4
PROMPTS, PROMPT_TOKENS, RESPONSE_TOKENS = 4, 40, 24


def truth(directory: Path, dtypes: list[str]) -> dict[str, torch.Tensor]:
    """The files' tensors, cast to one type after the other."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                value = tensors.get_tensor(name)
                for dtype in dtypes:
                    value = value.to(getattr(torch, dtype))
                found[name] = value
    return found


def save_random(model: Path, directory: Path) -> None:
    """The same model with weights that have nothing to do with it."""
    config = AutoConfig.from_pretrained(model)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)


def differing(true: dict[str, torch.Tensor], workers: list[list]) -> Iterator[str]:
    """What of the workers' (tensor, box, SHA-256) is not the truth's."""
    for number, boxes in enumerate(workers):
        for tensor, box, found in boxes:
            if digest(view(true[tensor], box)).hex() != found:
                yield f"worker {number}: {tensor} {written(box)}"


def uncovered(true: dict[str, torch.Tensor], workers: list[list]) -> Iterator[str]:
    """Tensors of which the workers of one engine have an element, and not every one."""
    entries = [entry for boxes in workers for entry in boxes]
    covered = {name: torch.zeros(true[name].shape, dtype=torch.bool) for name, _, _ in entries}
    for tensor, box, _ in entries:
        view(covered[tensor], box).fill_(True)
    yield from (name for name, here in covered.items() if not here.all())


def logprob_error(config: Config, model: Path, engines: EnginePool) -> float:
    """Largest distance between the engines' logprobs and transformers'."""
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    generator = np.random.default_rng(0)
    asked = [
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
    for request, generation in zip(asked, engines.generate(asked), strict=True):
        ids = torch.tensor([[*request.prompt_ids, *generation.token_ids.tolist()]])
        with torch.inference_mode():
            logprobs = oracle(ids).logits[0, PROMPT_TOKENS - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, ids[0, PROMPT_TOKENS:, None])[:, 0].numpy()
        worst = float(np.maximum(worst, np.abs(generation.logprobs - expected).max()))  # NaN stays
    return worst


def verified(config: Config, checked: CheckedRecipe, cluster: Cluster) -> dict:
    """The figures; what differs is named under `wrong`."""
    described, settings, model = checked.model, checked.settings, checked.model.directory
    check_recipe(config, described, settings, cluster.device)
    spec = transfer_spec(config, described, settings)
    true = truth(model, [config.trainer.dtype, config.rollout.dtype])
    true = {name: true[name] for name in described.tensor_shapes}
    wrong: list[str] = []
    figures: dict = {"tensors": len(true), "training_ranks": settings.sizes.world, "engine_workers": spec.engines.world}
    trainers = Trainers.start(settings, cluster.device, config.trainer.threads or 1, None, False)
    try:
        with tempfile.TemporaryDirectory() as other:
            save_random(model, Path(other))
            for readable in (True, False):
                engines = EnginePool(other, config.rollout, PROMPT_TOKENS + RESPONSE_TOKENS, cluster.device, readable=readable)
                try:
                    engines.start()
                    Publisher(trainers, engines, spec, config.trainer.timeout_s, verify_every=1).publish(1)
                    if readable:
                        figures |= compare(true, engines, wrong)
                    else:
                        figures["logprob_error"] = logprob_error(config, model, engines)
                finally:
                    engines.shutdown()
    finally:
        trainers.close()
    if config.rollout.dtype == "float32" and not figures["logprob_error"] <= TOLERANCE:
        wrong.append(f"logprobs differ by {figures['logprob_error']:.3g}, more than {TOLERANCE}")
    return figures | {"wrong": wrong}


def compare(true: dict[str, torch.Tensor], engines: EnginePool, wrong: list[str]) -> dict:
    """Compare what engines received and hold with the truth; returns counts of pieces, and adds each difference to `wrong`."""
    figures = {}
    for what, found in (("received", engines.received_digests()), ("stored", engines.stored_digests())):
        figures[what] = sum(len(boxes) for workers in found for boxes in workers)
        for number, workers in enumerate(found):
            wrong += [f"{what}, engine {number} {difference}" for difference in differing(true, workers)]
            wrong += [f"{what}, engine {number}: parts of {name} are missing" for name in uncovered(true, workers)]
            unseen = sorted(set(true) - {tensor for boxes in workers for tensor, _, _ in boxes})
            if what == "received":
                wrong += [f"received, engine {number}: {name} is missing" for name in unseen]
            else:
                figures["unreadable"] = max(figures.get("unreadable", 0), len(unseen))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_args()
    try:
        config = load_config(options.recipe, options.overrides)
        checked = check_run(config, expected_device(config)).in_hugging_face_format()
        cluster = open_cluster(config.ray_address, 64, config.rollout.sizes)
        try:
            figures = verified(config, checked, cluster)
        finally:
            cluster.close()
    except UserError as error:
        parser.exit(2, f"verify_sync: error: {error}\n")
    wrong = figures.pop("wrong")
    for difference in wrong:
        print(difference)
    print(json.dumps(figures | {"differences": len(wrong)}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
