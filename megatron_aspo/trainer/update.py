"""The algorithm of one training step on one rank, from a batch of scored responses to new weights.

    old and reference log-probabilities → advantages → mini-batches → objective → optimizer step

Not here: how a model runs over packed micro-batches (forward_backward.py), the loss of a micro-batch (losses/objective.py), how the rank is
built and how its weights travel (rank.py). Every public method is collective: all ranks call it with the same arguments.
"""

import time
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.common.host_memory import release_freed_memory
from megatron_aspo.data.batch import TrainBatch, mini_batches
from megatron_aspo.data.packing import PackingMetrics
from megatron_aspo.losses.advantages import advantages
from megatron_aspo.losses.aggregation import Totals
from megatron_aspo.losses.objective import Objective, ObjectiveTokens
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.tally import Tally, add_tallies
from megatron_aspo.losses.terms import kl_estimate, quantile
from megatron_aspo.trainer.forward_backward import ForwardBackward
from megatron_aspo.trainer.micro_batch import MicroBatch
from megatron_aspo.trainer.model import chunks
from megatron_aspo.trainer.optimizer import DistributedDataParallel, MegatronOptimizer, set_learning_rate, take_step
from megatron_aspo.trainer.parallel import ParallelState
from megatron_aspo.trainer.settings import RankSettings, UpdateReport
from megatron_aspo.trainer.transformer_engine import free_fp8_weights


@dataclass(frozen=True)
class Scores:
    """Per-token constants of the step's loss, float32 [response tokens]; on all ranks of the last stage.

    Log-probabilities that the trainer computes are 0 in responses without a counted token, unless their rewards need them.
    """

    old: Tensor
    """By the trainer, or by the engine with `old_logprobs: rollout`."""
    reference: Tensor | None
    advantages: Tensor


@dataclass(frozen=True)
class Models:
    """The models of a rank, and its optimizer."""

    policy: torch.nn.Module
    wrapped: list[DistributedDataParallel]
    """The policy's chunks in Megatron's gradient buffers."""
    reference: torch.nn.Module | None
    reference_memory: AbstractContextManager
    """Inside it the reference's weights are on the device."""
    optimizer: MegatronOptimizer
    optimizer_memory: AbstractContextManager
    """Inside it the optimizer's state is on the device."""


class Updater:
    """Trains the policy on one step's batch at a time."""

    def __init__(self, settings: RankSettings, parallel: ParallelState, device: torch.device, models: Models, passes: ForwardBackward):
        """Raises UserError if the policy loss cannot be loaded."""
        self._settings, self._parallel, self._device, self._models, self._passes = settings, parallel, device, models, passes
        self._objective = Objective(settings.algorithm)
        self._packing = PackingMetrics()

    def update(self, batch: TrainBatch, step: int) -> UpdateReport:
        """Compute old and reference log-probabilities, then take epochs × mini-batches of the policy loss, an optimizer step after each."""
        report = UpdateReport()
        self._packing = PackingMetrics()
        report.learning_rate = set_learning_rate(self._models.optimizer, self._settings.optimizer, step)
        with _timed(report, "logprobs"):
            scores, report.mismatch, report.tally = self.prepare(batch)
        algorithm = self._settings.algorithm
        seed = None if algorithm.batch_order == "data_index" else self._settings.seed + step
        with _timed(report, "update"):
            for samples in mini_batches(batch.groups, algorithm.mini_batch_prompts, algorithm.epochs, seed):
                samples = samples[batch.counted[samples] > 0]
                if not len(samples):
                    continue  # filtered whole: no gradient, no step
                report.tally = add_tallies(report.tally, self.accumulate_gradients(batch, samples, scores))
                applied, gradient_norm = self.apply_gradients()
                report.gradient_norms.append(gradient_norm)
                report.skipped_updates += not applied
                report.tokens += int(batch.lengths[samples].sum())
        report.packing = self._packing
        release_freed_memory()  # on the CPU, activations: engines generate next
        if self._parallel.is_last_stage:
            report.tally = self.sum_over_replicas(report.tally)
        return report

    def prepare(self, batch: TrainBatch) -> tuple[Scores, dict[str, float], Tally]:
        """Return the step's constants, the mismatch of trainer and engine, and the tally of a KL penalty in the reward."""
        algorithm, models = self._settings.algorithm, self._models
        # A penalty in the reward is part of the statistics of a group, to which every response belongs.
        penalized = algorithm.has_kl and algorithm.kl_in == "reward"
        samples = np.arange(batch.samples) if penalized else np.flatnonzero(batch.counted)
        current, _ = self.score(models.policy, batch, samples)
        reference = None
        if models.reference is not None:
            with models.reference_memory:
                reference, _ = self.score(models.reference, batch, samples)
            if self._settings.trainer.offload_reference:
                free_fp8_weights(models.reference)
        mismatch = _mismatch(current, batch) if self._parallel.is_last_stage else {}
        old = current if algorithm.old_logprobs == "recompute" else torch.from_numpy(batch.rollout_logprobs).to(current)
        rewards, tally = batch.rewards, {}
        if penalized:
            assert reference is not None  # scored above: with has_kl there is a reference policy
            penalty = algorithm.kl_coef * _response_kl(current, reference, batch, algorithm)
            rewards = rewards - penalty
            tally["kl_penalty"] = (float(penalty.sum()), batch.samples)
        per_sample = advantages(rewards, batch.groups, batch.counted, algorithm)
        per_token = torch.from_numpy(np.repeat(per_sample, np.diff(batch.response_offsets))).to(old)
        return Scores(old, reference, per_token), mismatch, tally

    @torch.no_grad()
    def score(self, model: torch.nn.Module, batch: TrainBatch, samples: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies of the response tokens of `samples`, zeros elsewhere.

        Both float32 [response tokens], complete on the last stage.
        """
        result = torch.zeros((2, int(batch.response_offsets[-1])), dtype=torch.float32, device=self._device)

        def keep(micro: MicroBatch, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tally]:
            result[:, micro.response_index] = torch.stack([logprob, entropy])
            return logprob.sum(), {}

        self._passes.run(chunks(model), batch, samples, keep, forward_only=True)
        if self._parallel.is_last_stage:
            # Each replica filled its own samples and left zeros elsewhere.
            dist.all_reduce(result, group=self._parallel.dp_group)
        return result[0], result[1]

    def accumulate_gradients(self, batch: TrainBatch, samples: np.ndarray, scores: Scores) -> Tally:
        """Run forward and backward of one mini-batch, whose gradient is then in the model. Return this replica's tally (last stage)."""
        totals = self._totals(batch, samples)
        rollout = torch.from_numpy(batch.rollout_logprobs).to(scores.old)

        def loss(micro: MicroBatch, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tally]:
            tokens = ObjectiveTokens(
                logprobs=logprob,
                entropy=entropy,
                old_logprobs=scores.old[micro.response_index],
                rollout_logprobs=rollout[micro.response_index],
                ref_logprobs=None if scores.reference is None else scores.reference[micro.response_index],
                advantages=scores.advantages[micro.response_index],
                mask=micro.mask,
                offsets=micro.offsets,
                names=micro.names,
            )
            return self._objective(tokens, totals)

        for chunk in self._models.wrapped:
            chunk.zero_grad_buffer()
        tallies, packing = self._passes.run(self._models.wrapped, batch, samples, loss, forward_only=False)
        self._packing += packing
        return add_tallies(*tallies)

    def _totals(self, batch: TrainBatch, samples: np.ndarray) -> Totals:
        """Return the denominators of the mini-batch; a quantile of entropy over all of it takes a forward pass of its own."""
        settings, counted, threshold = self._settings, batch.counted[samples], None
        if self._objective.needs_entropy_threshold:
            _, entropy = self.score(self._models.policy, batch, samples)
            chosen = np.repeat(np.isin(np.arange(batch.samples), samples), np.diff(batch.response_offsets)) & batch.mask
            threshold = quantile(entropy[torch.from_numpy(chosen).to(entropy.device)], settings.algorithm.low_entropy_quantile)
        return Totals(
            tokens=int(counted.sum()),
            responses=int((counted > 0).sum()),
            full_responses=settings.algorithm.mini_batch_prompts * settings.responses_per_prompt,
            max_response_tokens=settings.max_response_tokens,
            entropy_threshold=threshold,
        )

    def apply_gradients(self) -> tuple[bool, float]:
        """Clip and take one optimizer step. Return whether it was applied, and the gradient norm before clipping."""
        with self._models.optimizer_memory:
            return take_step(self._models.optimizer)

    def sum_over_replicas(self, tally: Tally) -> Tally:
        """Return the tallies of all data-parallel replicas added up; collective over the replicas."""
        tallies: list[Tally] = [{} for _ in range(self._parallel.sizes.data)]
        dist.all_gather_object(tallies, tally, group=self._parallel.dp_group)
        return add_tallies(*tallies)


def _mismatch(old: Tensor, batch: TrainBatch) -> dict[str, float]:
    """Return by how much trainer and engine differ on the counted tokens: `mean`, `max` of |old − rollout logprob|, `k3`."""
    mask = torch.from_numpy(batch.mask)
    if not mask.any():
        return {}
    difference = old.cpu().double()[mask] - torch.from_numpy(batch.rollout_logprobs).double()[mask]
    return {
        "mean": float(difference.abs().mean()),
        "max": float(difference.abs().max()),
        "k3": float((torch.expm1(difference) - difference).mean()),
    }


def _response_kl(current: Tensor, reference: Tensor, batch: TrainBatch, algorithm: AlgorithmOptions) -> np.ndarray:
    """Return the KL estimate summed over the tokens of each response, float64 [samples]."""
    per_token = kl_estimate(current, reference, algorithm.kl_estimator, algorithm.kl_value_clamp).cpu().double().numpy()
    owners = np.repeat(np.arange(batch.samples), np.diff(batch.response_offsets))
    return np.bincount(owners, weights=per_token, minlength=batch.samples)


@contextmanager
def _timed(report: UpdateReport, phase: str):
    start = time.perf_counter()
    yield
    report.seconds[phase] = time.perf_counter() - start
