"""Options of the rollout room."""

from dataclasses import dataclass

from megatron_aspo.weights.holdings import EngineSizes


@dataclass(frozen=True)
class RolloutOptions:
    engines: int = 1
    """Number of vLLM engines, each one Ray actor."""
    tensor_parallel: int = 1
    """Devices of one engine; all on one node."""
    expert_parallel: bool = False
    """The devices of an engine share a mixture's experts out whole instead of cutting each. Not on CPU."""
    dtype: str = "bfloat16"
    """`float32 | bfloat16`: the engine's weights and arithmetic."""
    prompts_per_step: int = 64
    responses_per_prompt: int = 16
    """G of the group statistics."""
    max_response_tokens: int = 32768
    temperature: float = 1.0
    """Divides the logits in engine and trainer alike."""
    max_running_requests: int = 64
    """Most requests one engine decodes at a time (vLLM's max_num_seqs)."""
    kv_cache_gib: float = 1.0
    """Key-value cache of one engine, in GiB."""
    sleep_level: int = 2
    """Of engines with placement=colocated, while ranks train: 1 keeps their weights in host memory, 2 forgets them, to be sent again."""
    threads: int = 0
    """CPU threads of one engine; 0 shares the node's cores evenly among its engines."""
    start_timeout_s: float = 600.0
    """An engine that is not up by then stops the run."""

    @property
    def sizes(self) -> EngineSizes:
        """How the engines' workers cut the model."""
        return EngineSizes(self.tensor_parallel, self.expert_parallel, self.engines)
