"""One training rank: its share of the model, the three passes over a step's batch, and its share of every weight transfer.

Every public method is collective: all ranks call it with the same arguments.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.trainer import device as devices, megatron_adapter

megatron_adapter.prepare()  # before anything else imports Megatron-Core

from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

from megatron_aspo.common.host_memory import release_freed_memory
from megatron_aspo.data.batch import TrainBatch, mini_batches
from megatron_aspo.data.packing import PackingFigures, measure, pack
from megatron_aspo.hf.model import HFModel, read_model
from megatron_aspo.hf.tensor_files import TensorReader
from megatron_aspo.hf.tensor_meta import TensorMeta
from megatron_aspo.hf.transfer import Gather, assemble, load
from megatron_aspo.losses.advantages import advantages
from megatron_aspo.losses.aggregation import Totals
from megatron_aspo.losses.check import reads_entropy_classes
from megatron_aspo.losses.objective import ObjectiveTokens, objective
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.tally import Tally, add_tallies
from megatron_aspo.losses.terms import kl_estimate, quantile
from megatron_aspo.sync.endpoints import LocalTensors, WeightSender
from megatron_aspo.sync.group import stateless_group
from megatron_aspo.sync.schedule import Schedule, TransferSpec, where_of
from megatron_aspo.trainer import parallel as parallel_states
from megatron_aspo.trainer.attention import packed_params
from megatron_aspo.trainer.layers import check_layers, choose_layer_spec, flash_attention, packing_rules
from megatron_aspo.trainer.logprobs import kernels, logprobs
from megatron_aspo.trainer.micro_batch import MicroBatch, cut_all
from megatron_aspo.trainer.model import build_model, chunks, transformer_config
from megatron_aspo.trainer.offload import HostMemory, OffloadedStorage
from megatron_aspo.trainer.optimizer import build_optimizer, fused_adam, set_learning_rate, wrap_model
from megatron_aspo.trainer.optimizer_state import optimizer_slabs, state_tensors
from megatron_aspo.trainer.settings import RankSettings, UpdateReport
from megatron_aspo.trainer.transformer_engine import free_fp8_weights
from megatron_aspo.weights.families import layout, replica_layouts

megatron_adapter.prepare()  # again, for the modules imported since


@dataclass(frozen=True)
class Scores:
    """What the policy loss holds fixed over the phase, float32 [response tokens]; on the last stage, all its ranks alike.

    What the trainer computes stands at 0 in responses of which no token counts, unless their rewards need it.
    """

    old: Tensor
    """By the trainer, or by the engine with `old_logprobs: rollout`."""
    reference: Tensor | None
    advantages: Tensor


class TrainerRank:
    def __init__(self, settings: RankSettings, rank: int, store: dist.Store, local_rank: int = 0):
        """Join the other ranks, which meet at `store`, build this rank's share of the model and fill it. Collective."""
        self.settings = settings
        options = settings.trainer
        self.device = devices.select_device(local_rank)
        if settings.deterministic:
            self.device.use_deterministic_kernels()
        self.hf: HFModel = read_model(settings.model_directory)
        settings.check_model(self.hf.dims)
        self.dtype = getattr(torch, options.dtype)
        self.layer_spec = choose_layer_spec(options, self.device)
        check_layers(options, self.layer_spec, self.hf.dims.experts)
        kernels(self.device.torch_device)  # now, if something is missing
        self.parallel = parallel_states.initialize(rank, settings.sizes, store, self.device, options.timeout_s, settings.seed)
        self.stored_layouts = replica_layouts(self.hf.architecture, self.hf.dims, settings.sizes, self.layer_spec)
        self.layout = layout(self.hf.architecture, self.hf.dims, settings.sizes, self.parallel.at, self.layer_spec)

        self._rules = packing_rules(options, settings.sizes, self.parallel.at)
        self._config = transformer_config(
            self.hf, self.parallel, self.device, self.dtype, self.layer_spec, options, deterministic=settings.deterministic
        )
        self.model = self._build()
        self.reference = self._build() if settings.algorithm.has_kl else None
        if self.reference is not None:
            self.reference.requires_grad_(False)
        kept_away = self.reference.parameters() if options.offload_reference and self.reference is not None else ()
        self._reference_memory = HostMemory(kept_away, self.device, constant=True)
        gradients = options.distributed_optimizer, options.gradient_dtype
        self._wrapped = [wrap_model(chunk, self._config, *gradients) for chunk in chunks(self.model)]
        self.optimizer = build_optimizer(self._wrapped, self._config, settings.optimizer, self.dtype, options.distributed_optimizer)
        # Before anything else asks for the state, and so makes all of it on the device.
        self._optimizer_memory = HostMemory(state_tensors(self.optimizer) if options.offload_optimizer else (), self.device)
        self._fill_main_weights()
        release_freed_memory()  # copies of the files
        self._forward_backward: Callable = get_forward_backward_func()
        self._sender = None
        self._packing = PackingFigures()
        self._offloaded: dict[str, OffloadedStorage] = {}

    def describe(self) -> dict[str, str]:
        """What was chosen, to be printed at the start."""
        chosen = {
            "device": str(self.device.torch_device),
            "backend": self.device.backend,
            "layout": self.settings.layout,
            "layer_spec": self.layer_spec,
            "optimizer": fused_adam(),
            "dtype": self.settings.trainer.dtype,
        }
        if self.layer_spec == "transformer_engine":
            chosen["flash_attn"] = flash_attention()
        return chosen | self.settings.non_default_memory_options

    def _build(self) -> torch.nn.Module:
        model = build_model(self.hf, self._config, self.parallel, self.layer_spec).to(self.device.torch_device)
        parameters = dict(model.named_parameters())
        load(self.layout, parameters, TensorReader(self.hf))
        for name in self.layout.expert_parameters:
            # Megatron marks them so, to be reduced over the experts' own replicas, only where experts are spread: not where they are merely
            # cut in fewer ways than the rest (expert_tensor_parallel < tensor_parallel).
            parameters[name].allreduce = False
        return model

    @torch.no_grad()
    def _fill_main_weights(self) -> None:
        """With bfloat16 Megatron makes the optimizer's float32 weights of rounded ones: they get what the files say.

        Rounded, each stands in the middle of its interval, out of which no single update of a usual learning rate takes a large weight.
        """
        reader = TensorReader(self.hf)
        if self.dtype == torch.float32 or set(reader.dtypes.values()) == {"bfloat16"}:
            return
        mains = {name: slab for name, slab in optimizer_slabs(self.model, self.optimizer).items() if slab.master is not None}
        for name, values in assemble(self.layout, reader, dict.fromkeys(mains, torch.float32)):
            mains[name].master.copy_(values.reshape(-1)[mains[name].start : mains[name].stop])

    # --- passes ---------------------------------------------------------------------------------------------------------------------------

    def update(self, batch: TrainBatch, step: int) -> UpdateReport:
        """Old and reference log-probabilities, then epochs × mini-batches of the policy loss, an optimizer step after each."""
        report = UpdateReport()
        self._packing = PackingFigures()
        report.learning_rate = set_learning_rate(self.optimizer, self.settings.optimizer, step)
        with _timed(report, "logprobs"):
            scores, report.mismatch, report.tally = self.prepare(batch)
        algorithm = self.settings.algorithm
        seed = None if algorithm.batch_order == "data_index" else self.settings.seed + step
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
        if self.parallel.is_last_stage:
            report.tally = self._sum_over_replicas(report.tally)
        return report

    def prepare(self, batch: TrainBatch) -> tuple[Scores, dict[str, float], Tally]:
        """Old and reference log-probabilities, advantages; how far trainer and engine differ; the tally of a KL penalty in the reward."""
        algorithm = self.settings.algorithm
        # A penalty in the reward is part of the statistics of a group, to which every response belongs.
        penalized = algorithm.has_kl and algorithm.kl_in == "reward"
        samples = np.arange(batch.samples) if penalized else np.flatnonzero(batch.counted)
        current, _ = self.score(self.model, batch, samples)
        reference = None
        if self.reference is not None:
            with self._reference_memory:
                reference, _ = self.score(self.reference, batch, samples)
            if self.settings.trainer.offload_reference:
                free_fp8_weights(self.reference)
        mismatch = _mismatch(current, batch) if self.parallel.is_last_stage else {}
        old = current if algorithm.old_logprobs == "recompute" else torch.from_numpy(batch.rollout_logprobs).to(current)
        rewards, tally = batch.rewards, {}
        if penalized:
            penalty = algorithm.kl_coef * _response_kl(current, reference, batch, algorithm)
            rewards = rewards - penalty
            tally["kl_penalty"] = (float(penalty.sum()), batch.samples)
        per_sample = advantages(rewards, batch.groups, batch.counted, algorithm)
        per_token = torch.from_numpy(np.repeat(per_sample, np.diff(batch.response_offsets))).to(old)
        return Scores(old, reference, per_token), mismatch, tally

    @torch.no_grad()
    def score(self, model: torch.nn.Module, batch: TrainBatch, samples: np.ndarray) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the response tokens of `samples`, zeros elsewhere, float32 [response tokens]; last stage."""
        result = torch.zeros((2, int(batch.response_offsets[-1])), dtype=torch.float32, device=self.device.torch_device)

        def keep(micro: MicroBatch, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tally]:
            result[:, micro.response_index] = torch.stack([logprob, entropy])
            return logprob.sum(), {}

        self._run(chunks(model), batch, samples, keep, forward_only=True)
        if self.parallel.is_last_stage:
            # Each replica filled its own samples and left zeros elsewhere.
            dist.all_reduce(result, group=self.parallel.dp_group)
        return result[0], result[1]

    def accumulate_gradients(self, batch: TrainBatch, samples: np.ndarray, scores: Scores) -> Tally:
        """Forward and backward of one mini-batch; leaves its gradient in the model. Returns this replica's tally (last stage)."""
        algorithm = self.settings.algorithm
        totals = self._totals(batch, samples)

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
            return objective(tokens, algorithm, totals)

        rollout = torch.from_numpy(batch.rollout_logprobs).to(scores.old)
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        return add_tallies(*self._run(self._wrapped, batch, samples, loss, forward_only=False))

    def _totals(self, batch: TrainBatch, samples: np.ndarray) -> Totals:
        """Denominators of the mini-batch; a quantile of entropy over all of it takes a forward pass of its own."""
        settings, counted = self.settings, batch.counted[samples]
        threshold = None
        if settings.algorithm.entropy_quantile_scope == "mini_batch" and reads_entropy_classes(settings.algorithm):
            _, entropy = self.score(self.model, batch, samples)
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
        """Clip and take one optimizer step; returns whether it was applied, and the gradient norm before clipping."""
        with self._optimizer_memory:
            applied, gradient_norm, _ = self.optimizer.step()
            self.optimizer.zero_grad()  # float32 copies of bfloat16 gradients would stay until the next step
        return bool(applied), float(gradient_norm)

    def _run(self, model: list, batch: TrainBatch, samples: np.ndarray, loss: Callable, *, forward_only: bool) -> list[Tally]:
        """Megatron's pipeline schedule over this replica's micro-batches of `samples`; `loss` runs on the last stage.

        Every context-parallel rank gives `loss` whole responses; its gradient goes on where a token's hidden state is.
        """
        options, rules = self.settings.trainer, self._rules
        asked = options.micro_batch_tokens, options.shared_prompts
        shares = pack(batch, samples, self.parallel.sizes.data, *asked, rules.count_multiple, self.hf.pair_cost)
        if not forward_only:
            self._packing += measure(batch, shares, *asked, self.hf.pair_cost)
        micros = cut_all(batch, shares[self.parallel.at.data], self.device.torch_device, options.shared_prompts, rules)

        def forward_step(iterator: Iterator[MicroBatch], model):
            micro = next(iterator)
            hidden = model(
                input_ids=micro.token_ids,
                position_ids=micro.position_ids,
                attention_mask=None,
                packed_seq_params=packed_params(micro, self.layer_spec),
            )

            def finish(hidden: Tensor) -> tuple[Tensor, Tensor, Tally]:
                logprob, entropy = logprobs(
                    hidden[micro.predictors, 0],
                    getattr(model, "module", model).output_weight(),
                    micro.targets,
                    self.settings.temperature,
                    self.parallel.tp_group,
                    vocab=self.hf.dims.vocab,
                    chunk_tokens=self.settings.trainer.logprob_chunk_tokens,
                )
                if micro.held is not None:
                    logprob, entropy = _whole_responses(torch.stack([logprob, entropy]), micro, self.parallel.cp_group)
                value, tally = loss(micro, logprob, entropy)
                # The schedule wants a count to divide by later; `finalize` in optimizer.py ignores it.
                return value, torch.zeros((), dtype=torch.int, device=value.device), tally

            return hidden, finish

        return self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=[iter(micros) for _ in model] if len(model) > 1 else iter(micros),
            model=model if len(model) > 1 else model[0],
            num_microbatches=len(micros),
            # Shapes are exchanged for each micro-batch (variable_seq_lengths), but where all are of one length.
            seq_length=micros[0].tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _sum_over_replicas(self, tally: Tally) -> Tally:
        tallies: list[Tally] = [{} for _ in range(self.parallel.sizes.data)]
        dist.all_gather_object(tallies, tally, group=self.parallel.dp_group)
        return add_tallies(*tallies)

    # --- weights --------------------------------------------------------------------------------------------------------------------------

    def tensor_metas(self, dtype: str) -> list[TensorMeta]:
        """Every Hugging Face tensor, in the order in which transfers send them."""
        return [TensorMeta(name, dtype, shape) for name, shape in self.hf.tensor_shapes.items()]

    def whole_tensors(
        self, metas: list[TensorMeta], value: Callable[[torch.nn.Parameter], Tensor] = lambda parameter: parameter
    ) -> Iterator[tuple[str, Tensor]]:
        """Whole Hugging Face tensors on rank 0; the other ranks of `stored_layouts` send, the rest do nothing.

        `value` picks what is gathered of each parameter, itself or a tensor of its shape (its gradient, say).
        """
        if self.parallel.rank not in self.stored_layouts:
            return iter(())
        held = {name: value(parameter) for name, parameter in self.model.named_parameters()}
        return Gather(self.stored_layouts, self.parallel.rank, held).whole(metas)

    def connect(self, host: str, port: int, spec: TransferSpec) -> None:
        """Join the group of all training ranks and the engines' workers, which rank 0 opens."""
        rank, timeout_s = self.parallel.rank, self.settings.trainer.timeout_s
        self._sender = None  # first give back what an earlier one holds
        backend = "gloo" if spec.colocated else self.device.backend
        group = stateless_group(host, port, rank, spec.world, timeout_s, backend, names=spec.name)
        self._sender = WeightSender(Schedule(spec, rank, where_of(group.places)), group, self.device.torch_device)

    def publish(self, version: int, verify: bool) -> int:
        """Send this rank's part of the current weights to the engines' workers; returns the bytes sent. Raises TransferError."""
        return self._sender.send(LocalTensors(self.layout, dict(self.model.named_parameters())), version, verify)

    def offload(self, part: str) -> None:
        """Free the device memory of the `optimizer`, gradients included, or of the `weights`, until `reload`.

        The tensors are collected again each time: the optimizer creates its state lazily and may replace it.
        """
        options, parameters = self.settings.trainer, list(self.model.parameters())
        if part == "optimizer":
            weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
            # With trainer.offload_optimizer the state is in host memory already.
            state = [] if options.offload_optimizer else state_tensors(self.optimizer)
            kept = [tensor for tensor in state if tensor.untyped_storage().data_ptr() not in weights]
            self._offloaded[part] = OffloadedStorage(kept, [parameter.main_grad for parameter in parameters], self.device)
        else:
            for model in (self.model, self.reference):
                if model is not None:
                    free_fp8_weights(model)
            reference = [] if self.reference is None or options.offload_reference else self.reference.parameters()
            self._offloaded[part] = OffloadedStorage([*parameters, *reference], [], self.device)
        self._offloaded[part].offload()

    def reload(self) -> None:
        """Bring everything that was offloaded back to the device."""
        for storage in self._offloaded.values():
            storage.reload()
        self._offloaded.clear()

    def close(self) -> None:
        """Leave all process groups. No part of this trainer can be used afterwards."""
        self._sender = None
        # Sharded optimizers hold views of the weights, and dispatchers of experts their last tokens, with autograd nodes whose hooks hold
        # everything else: cycles that Python's collector does not see. With them would live the groups, whose threads wake up a hundred
        # times a second.
        modules = [module for model in (*self._wrapped, self.reference) if model is not None for module in model.modules()]
        for part in (*getattr(self.optimizer, "chained_optimizers", [self.optimizer]), *modules):
            vars(part).clear()
        parallel_states.destroy()


def _whole_responses(values: Tensor, micro: MicroBatch, cp_group: dist.ProcessGroup) -> Tensor:
    """[2, response tokens of this rank] of each context-parallel rank → [2, response tokens] on all of them.

    All compute the same loss from it; in backward each rank takes the gradient of its own tokens, so that every token counts once.
    """
    placed = values.new_zeros(2, len(micro.response_index)).index_copy(1, micro.held, values)
    return reduce_from_tensor_model_parallel_region(placed, group=cp_group)


def _mismatch(old: Tensor, batch: TrainBatch) -> dict[str, float]:
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
    """float64 [samples]: the KL estimate summed over the tokens of each response."""
    per_token = kl_estimate(current, reference, algorithm.kl_estimator, algorithm.kl_value_clamp).cpu().double().numpy()
    owners = np.repeat(np.arange(batch.samples), np.diff(batch.response_offsets))
    return np.bincount(owners, weights=per_token, minlength=batch.samples)


@contextmanager
def _timed(report: UpdateReport, phase: str):
    start = time.perf_counter()
    yield
    report.seconds[phase] = time.perf_counter() - start
