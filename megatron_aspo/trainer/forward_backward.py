"""Run a model over the packed micro-batches of some samples: Megatron's pipeline schedule, up to the log-probability of each token."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from megatron_aspo.data.batch import TrainBatch
from megatron_aspo.data.packing import PackingMetrics, measure, pack
from megatron_aspo.hf.model import HFModel
from megatron_aspo.losses.tally import Tally
from megatron_aspo.trainer.attention import packed_params
from megatron_aspo.trainer.layers import packing_rules
from megatron_aspo.trainer.logprobs import logprobs
from megatron_aspo.trainer.micro_batch import MicroBatch, cut_all
from megatron_aspo.trainer.model import output_weight
from megatron_aspo.trainer.parallel import ParallelState
from megatron_aspo.trainer.settings import RankSettings

LossOfMicroBatch = Callable[[MicroBatch, Tensor, Tensor], tuple[Tensor, Tally]]
"""(micro-batch, log-probabilities, entropies of its response tokens, both float32 [response tokens]) → (scalar loss, its tally)."""


class ForwardBackward:
    """One rank's part of every pass over a batch."""

    def __init__(self, settings: RankSettings, hf: HFModel, parallel: ParallelState, device: torch.device, layer_spec: str):
        self._settings, self._hf, self._parallel, self._device, self._layer_spec = settings, hf, parallel, device, layer_spec
        self._rules = packing_rules(settings.trainer, settings.sizes, parallel.at)
        self._schedule: Callable = get_forward_backward_func()

    def run(
        self, model: Sequence[torch.nn.Module], batch: TrainBatch, samples: np.ndarray, loss: LossOfMicroBatch, *, forward_only: bool
    ) -> tuple[list[Tally], PackingMetrics]:
        """Run the model chunks over this replica's micro-batches of `samples`; collective over all ranks.

        Return the tallies of this rank's micro-batches (last stage; empty elsewhere) and, of a training pass, how well the samples of all
        replicas were packed.
        `loss` is called on the last stage, with whole responses on every context-parallel rank; its gradient reaches the rank that has a
        token's hidden state. Without `forward_only` the gradients are added to the model's.
        """
        options, rules = self._settings.trainer, self._rules
        limits = options.micro_batch_tokens, options.shared_prompts
        shares = pack(batch, samples, self._parallel.sizes.data, *limits, rules.count_multiple, self._hf.pair_cost)
        micros = cut_all(batch, shares[self._parallel.at.data], self._device, options.shared_prompts, rules)

        def forward_step(iterator: Iterator[MicroBatch], model: torch.nn.Module):
            micro = next(iterator)
            hidden = model(
                input_ids=micro.token_ids,
                position_ids=micro.position_ids,
                attention_mask=None,
                packed_seq_params=packed_params(micro, self._layer_spec),
            )

            def finish(hidden: Tensor) -> tuple[Tensor, Tensor, Tally]:
                value, tally = loss(micro, *self._logprobs(model, hidden, micro))
                # The schedule wants a count to divide by later; `finalize` in optimizer.py ignores it.
                return value, torch.zeros((), dtype=torch.int, device=value.device), tally

            return hidden, finish

        tallies = self._schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(micros) for _ in model] if len(model) > 1 else iter(micros),
            model=list(model) if len(model) > 1 else model[0],
            num_microbatches=len(micros),
            # Shapes are exchanged for each micro-batch (variable_seq_lengths), except where all have one length.
            seq_length=micros[0].tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return tallies, PackingMetrics() if forward_only else measure(batch, shares, *limits, self._hf.pair_cost)

    def _logprobs(self, model: torch.nn.Module, hidden: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return log-probability and entropy of each response token, [response tokens]; hidden: [tokens of this rank, 1, hidden size]."""
        logprob, entropy = logprobs(
            hidden[micro.predictors, 0],
            output_weight(model),
            micro.targets,
            self._settings.temperature,
            self._parallel.tp_group,
            vocab=self._hf.dims.vocab,
            chunk_tokens=self._settings.trainer.logprob_chunk_tokens,
        )
        if micro.held is not None:
            assert self._parallel.cp_group is not None  # only context-parallel ranks hold a part of the response tokens
            stacked, tokens = torch.stack([logprob, entropy]), len(micro.response_index)
            logprob, entropy = _whole_responses(stacked, micro.held, tokens, self._parallel.cp_group)
        return logprob, entropy


def _whole_responses(values: Tensor, held: Tensor, tokens: int, cp_group: dist.ProcessGroup) -> Tensor:
    """Return [2, response tokens] on every context-parallel rank, from [2, response tokens of this rank] on each; held: of MicroBatch.

    All compute the same loss from it; in backward each rank takes the gradient of its own tokens, so that every token counts once.
    """
    placed = values.new_zeros(2, tokens).index_copy(1, held, values)
    return reduce_from_tensor_model_parallel_region(placed, group=cp_group)
