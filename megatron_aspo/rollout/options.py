"""Options of the rollout room."""

from dataclasses import dataclass

from megatron_aspo.weights.holdings import EngineSizes


@dataclass(frozen=True)
class RolloutOptions:
    engines: int = 1
    """Number of vLLM engines, each one Ray actor."""
    tensor_parallel: int = 1
    """Devices of one engine, all on one node."""
    expert_parallel: bool = False
    """Give each device of an engine whole experts instead of a shard of every expert. Not on CPU."""
    dtype: str = "bfloat16"
    """Element type of the engine's weights and arithmetic."""
    prompts_per_step: int = 64
    """Prompts (groups) of a step."""
    responses_per_prompt: int = 16
    """Responses sampled for each prompt: the G of the group statistics."""
    max_response_tokens: int = 32768
    """A longer response is truncated."""
    temperature: float = 1.0
    """Sampling temperature; divides the logits in engine and trainer alike."""
    max_running_requests: int = 64
    """Upper bound on the requests that an engine decodes at a time (vLLM's `max_num_seqs`)."""
    kv_cache_gib: float = 1.0
    """Key-value cache of one engine, in GiB."""
    sleep_level: int = 2
    """`placement=colocated`: while the ranks train, 1 keeps the engines' weights in host memory, 2 drops them; they are then sent again."""
    threads: int = 0
    """CPU threads of one engine; 0 shares the node's cores evenly among its engines."""
    resource: str = ""
    """Custom Ray resource of which each engine takes 1: engines run only on nodes that were started with it. `placement=split` only."""
    start_timeout_s: float = 600.0
    """Seconds that an engine has to start; after that the run ends. A lost engine that starts again has less: five times what the first
    start took, at least 60."""
    answer_timeout_s: float = 300.0
    """Seconds without an answer after which an engine counts as frozen and is replaced; more than its longest step takes."""

    @property
    def sizes(self) -> EngineSizes:
        """How the engines' workers cut the model."""
        return EngineSizes(self.tensor_parallel, self.expert_parallel, self.engines)
