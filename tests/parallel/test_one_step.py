"""One off-policy step (r ≠ 1) on real Megatron-Core processes against plain PyTorch in float64."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_aspo.data.batch import TrainBatch
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
from tests.models import save_tiny
from tests.parallel import workloads
from tests.reference import objectives
from tests.reference.decoder import Decoder, token_logprobs

VOCAB = 131  # odd: padded under tensor parallelism
KL_COEF = 0.05
OPTIMIZER = OptimizerOptions(lr=1e-3, warmup_steps=1, weight_decay=0.1, eps=1e-4, clip_grad=0.5)
LAYOUTS = {
    "one process": {},
    "TP2": {"tensor_parallel": 2},
    "PP2": {"pipeline_parallel": 2},
    "DP2": {"data_parallel": 2},
    "TP2 PP2": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "shared prompts": {"shared_prompts": True},
    "shared prompts TP2 PP2": {"shared_prompts": True, "tensor_parallel": 2, "pipeline_parallel": 2},
}


@dataclass(frozen=True)
class Case:
    """A model on disk, and samples whose old and reference log-probabilities differ from the current ones."""

    directory: object
    prompts: list
    responses: list
    advantages: np.ndarray
    old: np.ndarray
    reference: np.ndarray

    def batch(self) -> TrainBatch:
        def offsets(lengths):
            return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

        tokens = [np.array(p + r) for p, r in zip(self.prompts, self.responses)]
        responses = offsets([len(r) for r in self.responses])
        return TrainBatch(
            token_ids=np.concatenate(tokens),
            offsets=offsets([len(t) for t in tokens]),
            response_offsets=responses,
            mask=np.ones(responses[-1], bool),
            rollout_logprobs=self.old,
            rewards=np.zeros(len(tokens)),
            groups=np.arange(len(tokens)) // 2,
            names=tuple(f"sample {i}" for i in range(len(tokens))),
        )


@pytest.fixture(scope="module", params=["llama untied", "llama tied", "qwen2 untied", "qwen2 tied", "qwen3 tied"])
def case(request, tmp_path_factory) -> Case:
    family, tying = request.param.split()
    return make_case(tmp_path_factory.mktemp("model"), family, tied=tying == "tied")


def make_case(directory: Path, family: str, tied: bool, seed: int = 0, **model) -> Case:
    """Make a case with a new random model; `seed` is that of the samples."""
    save_tiny(family, directory, tied=tied, **{"vocab_size": VOCAB, "num_hidden_layers": 4, **model})
    random = np.random.default_rng(seed)
    # Two responses to each prompt, matching the groups of the batch.
    # Without the padding token: its embedding is zero, and the norm after it makes a gradient that dwarfs all others.
    prompts = [random.integers(1, VOCAB, n).tolist() for n in random.integers(2, 30, 4) for _ in range(2)]
    prompts[1::2] = prompts[::2]
    responses = [random.integers(1, VOCAB, n).tolist() for n in (5, 17, 1, 9, 30, 2, 12, 7)]
    decoder = Decoder(directory)
    with torch.no_grad():
        current = np.concatenate([token_logprobs(decoder, p, r)[0].numpy() for p, r in zip(prompts, responses)])
    # No choice of experts depends on float32 rounding.
    assert decoder.narrowest_choice > 1e-4, decoder.narrowest_choice
    return Case(
        directory=directory,
        prompts=prompts,
        responses=responses,
        advantages=np.array([1.3, -0.7, 0.4, -1.1, 0.9, -0.2, 0.0, -1.6]),
        # Wide enough to cross both sides of the hard mask and of the cap.
        old=(current + random.normal(0, 0.9, current.shape)).astype(np.float32),
        reference=(current + random.normal(0, 0.3, current.shape)).astype(np.float32),
    )


@dataclass(frozen=True)
class Truth:
    logprobs: np.ndarray
    loss: float
    mean_token_loss: float
    gradients: dict
    weights: dict
    norm: float


_truths: dict[tuple, Truth] = {}


def truth(case: Case, policy_loss: str) -> Truth:
    """Return the truth, computed once for each model and loss."""
    key = (case.directory, policy_loss)
    if key not in _truths:
        _truths[key] = _compute_truth(case, policy_loss)
    return _truths[key]


def _compute_truth(case: Case, policy_loss: str) -> Truth:
    decoder = Decoder(case.directory)
    per_token, logprobs, start = [], [], 0
    for prompt, response, advantage in zip(case.prompts, case.responses, case.advantages.astype(np.float32)):
        logprob, entropy = token_logprobs(decoder, prompt, response)
        run = slice(start, start + len(response))
        start = run.stop
        old, reference = (torch.from_numpy(values[run]).double() for values in (case.old, case.reference))
        loss = getattr(objectives, policy_loss)(logprob, old, float(advantage), objectives.low_entropy(entropy))
        per_token.append(loss + KL_COEF * objectives.k3(logprob, reference))
        logprobs.append(logprob.detach())
    per_token = torch.cat(per_token)
    loss = per_token.sum() / len(per_token)
    loss.backward()
    gradients = {name: weight.grad for name, weight in decoder.weights.items()}
    norm = torch.sqrt(sum((g**2).sum() for g in gradients.values()))
    clip = min(1.0, OPTIMIZER.clip_grad / (float(norm) + 1e-6))
    weights = {
        name: objectives.adamw_first_step(
            weight.detach(), clip * gradients[name], lr=OPTIMIZER.lr, eps=OPTIMIZER.eps, weight_decay=OPTIMIZER.weight_decay
        )
        for name, weight in decoder.weights.items()
    }
    return Truth(
        logprobs=torch.cat(logprobs).numpy(),
        loss=float(loss.detach()),
        mean_token_loss=float(per_token.detach().abs().mean()),
        gradients={name: g.numpy() for name, g in gradients.items()},
        weights={name: w.numpy() for name, w in weights.items()},
        norm=float(norm),
    )


def run(pools, case: Case, policy_loss: str, optimizer: OptimizerOptions = OPTIMIZER, **layout) -> list[dict]:
    from megatron_aspo.trainer.settings import RankSettings

    trainer = TrainerOptions(**{"dtype": "float32", "micro_batch_tokens": 64, "logprob_chunk_tokens": 16} | layout)
    settings = RankSettings(
        model_directory=case.directory,
        trainer=trainer,
        optimizer=optimizer,
        algorithm=AlgorithmOptions(policy_loss=policy_loss, kl_coef=KL_COEF),
        temperature=1.0,
        seed=0,
        responses_per_prompt=2,
        max_response_tokens=32,
    )
    return pools(settings.sizes.world).run(workloads.one_step, settings, case.batch(), case.old, case.reference, case.advantages)


def relative_error(ours: dict, true: dict) -> float:
    """Return the largest difference over the largest value of any tensor. An expert that no token chose has a zero gradient, ours too."""
    assert set(ours) == set(true)
    differences = {name: np.abs(ours[name] - true[name]).max() for name in true}
    # NumPy's maximum, because it propagates NaN.
    return float(np.max([difference / np.abs(true[name]).max() if difference else 0.0 for name, difference in differences.items()]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy_loss", ["aspo", "ppo_clip"])
def test_one_step_equals_float64_pytorch_on_every_layout(pools, case, policy_loss, layout):
    true = truth(case, policy_loss)
    results = run(pools, case, policy_loss, **LAYOUTS[layout])
    ours = results[0]
    last = results[-1]
    assert np.abs(last["logprobs"] - true.logprobs).max() < 1e-5
    total, count = last["tally"]["loss"]
    assert abs(total / count - true.loss) / true.mean_token_loss <= 1e-5
    assert abs(ours["norm"] / true.norm - 1) <= 1e-5
    assert relative_error(ours["gradients"], true.gradients) <= 1e-5
    assert relative_error(ours["weights"], true.weights) <= 1e-5


def test_distributed_optimizer_takes_the_same_step(pools, case):
    true = truth(case, "aspo")
    ours = run(pools, case, "aspo", data_parallel=2, distributed_optimizer=True)[0]
    assert relative_error(ours["weights"], true.weights) <= 1e-5


def test_weight_decay_applies_to_biases_and_norms_when_enabled(pools, case):
    """The first Adam step of a one-dimensional parameter with decay is the one without, less lr · decay of the weight."""
    without, start = truth(case, "aspo").weights, Decoder(case.directory).weights
    ours = run(pools, case, "aspo", replace(OPTIMIZER, decay_one_dimensional=True))[0]["weights"]
    norms = [name for name, weight in start.items() if weight.dim() == 1]
    assert norms
    for name in norms:
        expected = without[name] - OPTIMIZER.lr * OPTIMIZER.weight_decay * start[name].detach().numpy()
        assert np.abs(ours[name] - expected).max() < 1e-6 < np.abs(ours[name] - without[name]).max()


def test_aspo_and_ppo_clip_differ_as_in_the_reference(pools, case):
    true = {name: truth(case, name).gradients for name in ("aspo", "ppo_clip")}
    ours = {name: run(pools, case, name)[0]["gradients"] for name in ("aspo", "ppo_clip")}
    tensor = "model.layers.0.mlp.up_proj.weight"
    expected = true["aspo"][tensor] - true["ppo_clip"][tensor]
    assert np.abs(expected).max() > 0.1 * np.abs(true["aspo"][tensor]).max()
    assert np.abs(ours["aspo"][tensor] - ours["ppo_clip"][tensor] - expected).max() <= 2e-5 * np.abs(expected).max()
