"""Options of the training ranks and of the optimizer."""

from typing import Annotated

from pydantic import Field

from megatron_aspo.common.errors import require
from megatron_aspo.common.options import Choice, NonNegative, Positive, Rule, options

Beta = Annotated[float, Field(ge=0, lt=1), Rule("must be in [0, 1)")]


@options("trainer")
class TrainerOptions:
    tensor_parallel: Positive[int] = 1
    """Ranks that share each matrix."""
    pipeline_parallel: Positive[int] = 1
    """Stages that share the layers."""
    data_parallel: Positive[int] = 1
    """Replicas that share the samples."""
    sequence_parallel: bool = False
    """Shard the tokens between the tensor-parallel blocks over the tensor-parallel ranks; models with experts require it when
    `tensor_parallel` is above 1."""
    virtual_pipeline: Positive[int] = 1
    """Model chunks per pipeline stage; above 1 the schedule is interleaved, which shortens the pipeline's idle time."""
    context_parallel: Positive[int] = 1
    """Ranks that share the tokens of each sequence."""
    expert_parallel: Positive[int] = 1
    """Ranks of a pipeline stage that share the experts of a layer."""
    expert_tensor_parallel: NonNegative[int] = 0
    """Ranks that share each expert's matrices; 0 means `tensor_parallel`."""
    dtype: Annotated[str, Choice("float32", "bfloat16")] = "bfloat16"
    """Element type of parameters and activations; with `bfloat16` the optimizer keeps float32 main weights."""
    gradient_dtype: Annotated[str, Choice("float32", "bfloat16")] = "float32"
    """Element type in which gradients are summed over micro-batches and data-parallel ranks. `bfloat16` halves their memory and traffic,
    and rounds each partial sum to 8 bits; it needs `dtype=bfloat16`."""
    fp8: Annotated[str, Choice("none", "e4m3", "hybrid")] = "none"
    """FP8 format of the factors of matrix products (weights and activations; with `hybrid`, gradients are e5m2), each tensor scaled by
    its own largest element. Needs Transformer Engine, a GPU of compute capability 8.9 or higher, and `dtype=bfloat16`, which parameters
    keep."""
    layer_spec: Annotated[str, Choice("auto", "local", "transformer_engine")] = "auto"
    """Implementation of the layers; `auto` is Transformer Engine for bfloat16 where CUDA and the package are present, else `local`."""
    distributed_optimizer: bool = False
    """Shard the optimizer state over the data-parallel and context-parallel ranks."""
    micro_batch_tokens: Positive[int] = 16384
    """Upper bound on the tokens of a packed micro-batch, over all context-parallel ranks and before padding; a longer sample is a
    separate micro-batch."""
    shared_prompts: bool = False
    """Compute a group's prompt once for all its responses. Exact. It saves most of the work when answers are short; when they are long
    it costs attention over masked pairs. Needs the `local` layers (`layer_spec`)."""
    logprob_chunk_tokens: Positive[int] = 512
    """Upper bound on the logits that exist at one time, in tokens: at most this many tokens × vocabulary elements. The vocabulary is
    walked in blocks."""
    recompute: Annotated[str, Choice("none", "selective", "full")] = "none"
    """Activations that the backward pass recomputes instead of keeping them; the gradient is the same. `selective`: those inside
    feed-forward (or experts) and core attention. `full`: whole layers, keeping only their inputs."""
    offload_optimizer: bool = False
    """Keep the optimizer state (Adam's moments, and with bfloat16 the float32 main weights) in host memory, and move it to the device
    for each optimizer step, when there are no activations. On a CPU it saves nothing."""
    offload_reference: bool = False
    """Keep the weights of the reference policy in host memory, and move them to the device for its forward pass. Needs
    `algorithm.kl_coef` above 0."""
    threads: NonNegative[int] = 0
    """CPU threads of one rank; 0 shares the node's cores evenly among its ranks."""
    resource: str = ""
    """Custom Ray resource; each training rank takes 1, so ranks run only on nodes that were started with it."""
    timeout_s: Positive[float] = 600.0
    """Seconds after which a collective or a weight transfer fails and ends the run. Megatron rounds its own groups' timeout to whole
    minutes, at least one."""


@options("optimizer")
class OptimizerOptions:
    lr: Positive[float] = 1e-6
    """Learning rate of AdamW after warm-up; constant."""
    warmup_steps: NonNegative[int] = 10
    """Rollout steps of linear warm-up, from `lr` / `warmup_steps`."""
    warmup_from_zero: bool = False
    """Start the warm-up at 0 instead: the first step then changes nothing."""
    weight_decay: NonNegative[float] = 0.1
    """Decoupled weight decay of AdamW."""
    decay_one_dimensional: bool = False
    """Apply the weight decay to biases and norms too."""
    beta1: Beta = 0.9
    """Decay of Adam's first moment."""
    beta2: Beta = 0.999
    """Decay of Adam's second moment."""
    eps: Positive[float] = 1e-8
    """Added to the denominator of Adam's update."""
    clip_grad: NonNegative[float] = 1.0
    """Upper bound of the global gradient norm; 0 turns clipping off."""


def check_trainer(trainer: TrainerOptions) -> None:
    """Raise UserError for options of the training ranks that do not go together or have no effect."""
    require(
        trainer.dtype == "bfloat16" or trainer.gradient_dtype == "float32",
        f"trainer.gradient_dtype={trainer.gradient_dtype} would round the gradients of a model in trainer.dtype=float32; set it to "
        "float32, or trainer.dtype=bfloat16",
    )
    require(
        trainer.dtype == "bfloat16" or trainer.fp8 == "none",
        f"trainer.fp8={trainer.fp8} goes with trainer.dtype=bfloat16, not float32; set trainer.fp8=none, or that dtype",
    )
    require(
        not trainer.distributed_optimizer or trainer.data_parallel * trainer.context_parallel > 1,
        "trainer.distributed_optimizer=true shards over data-parallel and context-parallel ranks; set trainer.data_parallel above 1 or "
        "leave it false",
    )
    require(
        not trainer.sequence_parallel or trainer.tensor_parallel > 1,
        "trainer.sequence_parallel=true spreads tokens over tensor-parallel ranks; set trainer.tensor_parallel above 1 or leave it false",
    )
    require(
        trainer.virtual_pipeline == 1 or trainer.pipeline_parallel > 1,
        f"trainer.virtual_pipeline={trainer.virtual_pipeline} interleaves pipeline stages, of which there is one; set it to 1, or "
        "trainer.pipeline_parallel above 1",
    )


def check_optimizer(optimizer: OptimizerOptions, implied: bool = False) -> None:
    """Raise UserError for options of the optimizer that have no effect. implied: a preset set them, so that they may have none."""
    require(
        not optimizer.warmup_from_zero or optimizer.warmup_steps > 0,
        "optimizer.warmup_from_zero=true has no effect but a first step without learning when optimizer.warmup_steps=0; set one of them",
    )
    require(
        not optimizer.decay_one_dimensional or optimizer.weight_decay > 0 or implied,
        "optimizer.decay_one_dimensional=true has no effect with optimizer.weight_decay=0; set one of them",
    )
