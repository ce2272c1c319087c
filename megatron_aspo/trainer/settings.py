"""Settings of a training rank and the report of a step: plain values that are sent between processes, no torch."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.packing import PackingMetrics
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.losses.tally import Tally
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
from megatron_aspo.weights.layout import LayoutError, ModelDims, ParallelSizes, check_divisible


@dataclass(frozen=True)
class RankSettings:
    """Settings of a training rank; plain values, so that any process can receive them."""

    model_directory: Path
    trainer: TrainerOptions
    optimizer: OptimizerOptions
    algorithm: AlgorithmOptions
    temperature: float
    seed: int
    responses_per_prompt: int
    """G; times mini_batch_prompts, the number of responses of a full mini-batch."""
    max_response_tokens: int
    deterministic: bool = False
    """Use only deterministic kernels, and refuse operations that have none."""

    @property
    def sizes(self) -> ParallelSizes:
        trainer = self.trainer
        return ParallelSizes(
            tensor=trainer.tensor_parallel,
            pipeline=trainer.pipeline_parallel,
            data=trainer.data_parallel,
            virtual=trainer.virtual_pipeline,
            expert=trainer.expert_parallel,
            expert_tensor=trainer.expert_tensor_parallel or None,
            context=trainer.context_parallel,
        )

    @property
    def layout(self) -> str:
        """The layout in the usual abbreviations, TP2 SP PP2 VPP2 CP2 DP2 EP2 ETP1, without axes of size 1; `whole` when all are."""
        trainer = self.trainer
        parts = {
            f"TP{trainer.tensor_parallel}": trainer.tensor_parallel > 1,
            "SP": trainer.sequence_parallel,
            f"PP{trainer.pipeline_parallel}": trainer.pipeline_parallel > 1,
            f"VPP{trainer.virtual_pipeline}": trainer.virtual_pipeline > 1,
            f"CP{trainer.context_parallel}": trainer.context_parallel > 1,
            f"DP{trainer.data_parallel}": trainer.data_parallel > 1,
            f"EP{trainer.expert_parallel}": trainer.expert_parallel > 1,
            f"ETP{trainer.expert_tensor_parallel}": trainer.expert_tensor_parallel > 0,
        }
        return " ".join(name for name, cuts in parts.items() if cuts) or "whole"

    @property
    def non_default_memory_options(self) -> dict[str, str]:
        """The options that trade time or rounding for memory, by name, that are not at their defaults."""
        given, default = self.trainer, TrainerOptions()
        names = ("gradient_dtype", "fp8", "recompute", "offload_optimizer", "offload_reference")
        return {name: str(getattr(given, name)).lower() for name in names if getattr(given, name) != getattr(default, name)}

    def check_model(self, dims: ModelDims) -> None:
        """Raise UserError if a model of these sizes cannot be trained with these options."""
        try:
            check_divisible(dims, self.sizes)
        except LayoutError as error:
            raise error.worded(lambda name, value: f"trainer.{name}={value}") from None
        trainer = self.trainer
        if not dims.experts and trainer.expert_tensor_parallel:
            raise UserError(f"trainer.expert_tensor_parallel={trainer.expert_tensor_parallel}: the model has no experts; leave it out")
        if trainer.offload_reference and not self.algorithm.has_kl:
            raise UserError(
                "trainer.offload_reference=true has no effect with algorithm.kl_coef=0, which needs no reference policy; set one of them"
            )
        if trainer.fp8 != "none":
            _check_fp8(trainer, dims)
        if dims.experts and trainer.tensor_parallel > 1 and not trainer.sequence_parallel:
            raise UserError(
                f"trainer.tensor_parallel={trainer.tensor_parallel}: Megatron trains a model with experts under tensor parallelism only "
                "with sequence parallelism; set trainer.sequence_parallel=true"
            )

    def check_device(self, device: str) -> None:
        """Raise UserError for options that need a GPU when device is `cpu`. Each rank checks which GPU and packages it has."""
        trainer = self.trainer
        if device == "cpu" and trainer.layer_spec == "transformer_engine":
            raise UserError("trainer.layer_spec=transformer_engine needs a CUDA device, which is not here; use auto or local")
        if device == "cpu" and trainer.fp8 != "none":
            raise UserError(f"trainer.fp8={trainer.fp8} needs a GPU of compute capability 8.9 or higher; set trainer.fp8=none")


def _check_fp8(trainer: TrainerOptions, dims: ModelDims) -> None:
    """Raise UserError unless each side of a rank's matrices is a multiple of 16, as Transformer Engine's FP8 products require."""
    if dims.experts:
        raise UserError(f"trainer.fp8={trainer.fp8} takes dense models only, as experts get any number of tokens; set it to none")
    cut = (dims.ffn, dims.heads * dims.head_dim, (dims.heads + 2 * dims.kv_heads) * dims.head_dim)
    for side in (dims.hidden, *(size // trainer.tensor_parallel for size in cut)):
        if side % 16:
            raise UserError(
                f"trainer.fp8={trainer.fp8} needs matrices whose sides are multiples of 16, and a rank of this model at "
                f"trainer.tensor_parallel={trainer.tensor_parallel} has one of {side}; set trainer.fp8=none"
            )


@dataclass
class UpdateReport:
    """The result of one step's training; complete on the ranks of the last stage, empty elsewhere."""

    tally: Tally = field(default_factory=dict)
    mismatch: dict[str, float] = field(default_factory=dict)
    """Engine compared with trainer on the same tokens: `mean` and `max` of |old − rollout logprob|, and `k3`."""
    gradient_norms: list[float] = field(default_factory=list)
    skipped_updates: int = 0
    learning_rate: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    packing: PackingMetrics = field(default_factory=PackingMetrics)
    """Packing of the mini-batches trained on."""
    tokens: int = 0
    """Tokens of the samples trained on in all passes, each prompt counted for each of its responses, shared or not."""
