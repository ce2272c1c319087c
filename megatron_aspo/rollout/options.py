"""Options of the rollout room."""

from typing import Annotated

from pydantic import Field

from megatron_aspo.common.options import Choice, NonNegative, Positive, options
from megatron_aspo.rollout.engine_layout import EngineSizes, check_engine, check_engine_on
from megatron_aspo.weights.layout import LayoutError, ModelDims


@options("rollout")
class RolloutOptions:
    engines: Positive[int] = 1
    """Number of vLLM engines, each one Ray actor."""
    tensor_parallel: Positive[int] = 1
    """Devices of one engine, all on one node."""
    expert_parallel: bool = False
    """Give each device of an engine whole experts instead of a shard of every expert. Not on CPU."""
    dtype: Annotated[str, Choice("float32", "bfloat16")] = "bfloat16"
    """Element type of the engine's weights and arithmetic."""
    prompts_per_step: Positive[int] = 64
    """Prompts (groups) of a step."""
    responses_per_prompt: Positive[int] = 16
    """Responses sampled for each prompt: the G of the group statistics."""
    max_response_tokens: Positive[int] = 32768
    """A longer response is truncated."""
    temperature: Annotated[float, Field(ge=0.01)] = 1.0  # vLLM would raise a smaller one to 0.01 by itself
    """Sampling temperature; divides the logits in engine and trainer alike."""
    max_running_requests: Positive[int] = 64
    """Upper bound on the requests that an engine decodes at a time (vLLM's `max_num_seqs`)."""
    kv_cache_gib: Positive[float] = 1.0
    """Key-value cache of one engine, in GiB."""
    sleep_level: Annotated[int, Choice(1, 2)] = 2
    """`placement=colocated`: while the ranks train, 1 keeps the engines' weights in host memory, 2 drops them; they are then sent again."""
    threads: NonNegative[int] = 0
    """CPU threads of one engine; 0 shares the node's cores evenly among its engines."""
    resource: str = ""
    """Custom Ray resource of which each engine takes 1: engines run only on nodes that were started with it. `placement=split` only."""
    start_timeout_s: Positive[float] = 600.0
    """Seconds that an engine has to start; after that the run ends. A lost engine that starts again has less: five times what the first
    start took, at least 60."""
    answer_timeout_s: Positive[float] = 300.0
    """Seconds without an answer after which an engine counts as frozen and is replaced; more than its longest step takes."""

    @property
    def sizes(self) -> EngineSizes:
        """The parallel sizes of all engines."""
        return EngineSizes(self.tensor_parallel, self.expert_parallel, self.engines)


def check_engines(rollout: RolloutOptions, dims: ModelDims, device: str) -> None:
    """Raise UserError when the engines cannot hold a model of these sizes, or compute it on the device.

    device: `cpu | cuda`; empty while it is not known.
    """
    try:
        check_engine(dims, rollout.sizes)
        check_engine_on(device, dims, rollout.sizes)
    except LayoutError as error:
        raise error.worded(lambda name, value: f"rollout.{name}={value}") from None
