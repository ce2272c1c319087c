"""Options of the training ranks and of the optimizer."""

from dataclasses import dataclass

from megatron_aspo.errors import UserError
from megatron_aspo.losses.check import nearest

CHOICES = {
    "gradient_dtype": ("float32", "bfloat16"),
    "fp8": ("none", "e4m3", "hybrid"),
    "recompute": ("none", "selective", "full"),
}
"""The words that an option of the trainer may be."""


@dataclass(frozen=True)
class TrainerOptions:
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    sequence_parallel: bool = False
    """Spread the tokens between the tensor-parallel blocks over the tensor-parallel ranks; models with experts need it there."""
    virtual_pipeline: int = 1
    """Model chunks of each pipeline stage: the interleaved schedule, with less idle time."""
    context_parallel: int = 1
    """Ranks over which the tokens of each sequence are spread."""
    expert_parallel: int = 1
    """Ranks over which the experts of a layer are spread, out of those of a pipeline stage."""
    expert_tensor_parallel: int = 0
    """Ways in which each expert is cut; 0: as tensor_parallel."""
    dtype: str = "bfloat16"
    """`float32 | bfloat16`: parameters and activations; with bfloat16 the optimizer keeps float32 main weights."""
    gradient_dtype: str = "float32"
    """`float32 | bfloat16`: in which gradients are added up over micro-batches and data-parallel ranks. bfloat16 halves that memory and
    traffic, and rounds each partial sum to 8 bits; it needs dtype=bfloat16."""
    fp8: str = "none"
    """`none | e4m3 | hybrid`: format of the factors of matrix products (weights and activations; with hybrid, gradients as e5m2), each
    tensor scaled by its own largest element. Needs Transformer Engine, a GPU of compute capability 8.9 and dtype=bfloat16, which parameters
    stay in."""
    layer_spec: str = "auto"
    """`auto | local | transformer_engine`: auto takes Transformer Engine where CUDA and the package are present."""
    distributed_optimizer: bool = False
    """Shard the optimizer state over the data-parallel and context-parallel ranks."""
    micro_batch_tokens: int = 16384
    """Most tokens in one packed micro-batch, over all context-parallel ranks and before padding; a longer sample is a micro-batch of its
    own."""
    shared_prompts: bool = False
    """Compute the tokens of a group's prompt once for all its responses; exact. For short answers it saves most of the work, for long ones
    it costs attention over masked pairs. Needs the local layer spec."""
    logprob_chunk_tokens: int = 512
    """As many logits exist at one time as so many tokens have, in blocks of the vocabulary over all response tokens of a micro-batch."""
    recompute: str = "none"
    """`none | selective | full`: activations that backward computes again instead of keeping them; the gradient is the same. selective:
    the insides of feed-forward or experts and of core attention; full: whole layers, of which only the input is kept."""
    offload_optimizer: bool = False
    """Keep the optimizer state (Adam's moments, and with bfloat16 the float32 main weights) in host memory, and bring it to the device for
    each optimizer step: it never stands there beside activations. On the CPU, whose memory is the host's, it saves nothing."""
    offload_reference: bool = False
    """Keep the weights of the reference policy in host memory, and bring them to the device for its pass."""
    threads: int = 0
    """CPU threads of one rank; 0 shares the node's cores evenly among its ranks."""
    timeout_s: float = 600.0
    """A collective that takes longer ends the run; Megatron counts its own groups' in whole minutes, at least one."""

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
    warmup_steps: int = 10
    """Rollout steps of linear warm-up, from lr / warmup_steps."""
    warmup_from_zero: bool = False
    """Start the warm-up at 0 instead: the first step changes nothing."""
    weight_decay: float = 0.1
    decay_one_dimensional: bool = False
    """Apply the weight decay to biases and norms too."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0
    """Global gradient norm; 0 turns clipping off."""
