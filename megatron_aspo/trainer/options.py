"""Options of the training ranks and of the optimizer."""

from dataclasses import dataclass

from megatron_aspo.common.errors import UserError, nearest

CHOICES = {
    "gradient_dtype": ("float32", "bfloat16"),
    "fp8": ("none", "e4m3", "hybrid"),
    "recompute": ("none", "selective", "full"),
}
"""The words that an option of the trainer may be."""


@dataclass(frozen=True)
class TrainerOptions:
    tensor_parallel: int = 1
    """Ranks that share each matrix."""
    pipeline_parallel: int = 1
    """Stages that share the layers."""
    data_parallel: int = 1
    """Replicas that share the samples."""
    sequence_parallel: bool = False
    """Shard the tokens between the tensor-parallel blocks over the tensor-parallel ranks; models with experts require it when
    `tensor_parallel` is above 1."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline stage; above 1 the schedule is interleaved, which shortens the pipeline's idle time."""
    context_parallel: int = 1
    """Ranks that share the tokens of each sequence."""
    expert_parallel: int = 1
    """Ranks of a pipeline stage that share the experts of a layer."""
    expert_tensor_parallel: int = 0
    """Ranks that share each expert's matrices; 0 means `tensor_parallel`."""
    dtype: str = "bfloat16"
    """Element type of parameters and activations; with `bfloat16` the optimizer keeps float32 main weights."""
    gradient_dtype: str = "float32"
    """Element type in which gradients are summed over micro-batches and data-parallel ranks. `bfloat16` halves their memory and traffic,
    and rounds each partial sum to 8 bits; it needs `dtype=bfloat16`."""
    fp8: str = "none"
    """FP8 format of the factors of matrix products (weights and activations; with `hybrid`, gradients are e5m2), each tensor scaled by
    its own largest element. Needs Transformer Engine, a GPU of compute capability 8.9 or higher, and `dtype=bfloat16`, which parameters
    keep."""
    layer_spec: str = "auto"
    """Implementation of the layers; `auto` is Transformer Engine for bfloat16 where CUDA and the package are present, else `local`."""
    distributed_optimizer: bool = False
    """Shard the optimizer state over the data-parallel and context-parallel ranks."""
    micro_batch_tokens: int = 16384
    """Upper bound on the tokens of a packed micro-batch, over all context-parallel ranks and before padding; a longer sample is a
    micro-batch by itself."""
    shared_prompts: bool = False
    """Compute a group's prompt once for all its responses. Exact. It saves most of the work when answers are short; when they are long
    it costs attention over masked pairs. Needs the `local` layers (`layer_spec`)."""
    logprob_chunk_tokens: int = 512
    """Upper bound on the logits that exist at one time, in tokens: at most this many tokens × vocabulary elements. The vocabulary is
    walked in blocks."""
    recompute: str = "none"
    """Activations that backward computes again instead of keeping them; the gradient is the same. `selective`: the insides of
    feed-forward (or experts) and of core attention. `full`: whole layers, of which only the input is kept."""
    offload_optimizer: bool = False
    """Keep the optimizer state (Adam's moments, and with bfloat16 the float32 main weights) in host memory, and move it to the device
    for each optimizer step, when there are no activations. On a CPU it saves nothing."""
    offload_reference: bool = False
    """Keep the weights of the reference policy in host memory, and move them to the device for its forward pass. Needs
    `algorithm.kl_coef` above 0."""
    threads: int = 0
    """CPU threads of one rank; 0 shares the node's cores evenly among its ranks."""
    resource: str = ""
    """Custom Ray resource of which each training rank takes 1: ranks run only on nodes that were started with it."""
    timeout_s: float = 600.0
    """Seconds after which a collective or a weight transfer fails and ends the run. Megatron rounds its own groups' timeout to whole
    minutes, at least one."""

    def __post_init__(self):
        """Raises UserError for a word that is none of an option's, and for element types that do not go together."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"trainer.{name}={getattr(self, name)} is not known; {nearest(getattr(self, name), choices)}")
        if self.dtype == "float32" and self.gradient_dtype != "float32":
            raise UserError(
                f"trainer.gradient_dtype={self.gradient_dtype} would round the gradients of a model in trainer.dtype=float32; set it to "
                "float32, or trainer.dtype=bfloat16"
            )
        if self.dtype == "float32" and self.fp8 != "none":
            raise UserError(f"trainer.fp8={self.fp8} goes with trainer.dtype=bfloat16, not float32; set trainer.fp8=none, or that dtype")


@dataclass(frozen=True)
class OptimizerOptions:
    lr: float = 1e-6
    """Learning rate of AdamW after warm-up; constant."""
    warmup_steps: int = 10
    """Rollout steps of linear warm-up, from `lr` / `warmup_steps`."""
    warmup_from_zero: bool = False
    """Start the warm-up at 0 instead: the first step then changes nothing."""
    weight_decay: float = 0.1
    """Decoupled weight decay of AdamW."""
    decay_one_dimensional: bool = False
    """Apply the weight decay to biases and norms too."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.999
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Added to the denominator of Adam's update."""
    clip_grad: float = 1.0
    """Upper bound of the global gradient norm; 0 turns clipping off."""
