"""Options of evaluations: of those during training, and of `megatron-aspo eval`."""

from dataclasses import field
from typing import Annotated

from pydantic import Field

from megatron_aspo.common.errors import require
from megatron_aspo.common.options import Choice, Condition, NonNegative, Positive, Rule, options
from megatron_aspo.rewards.options import check_rewards
from megatron_aspo.rollout.options import RolloutOptions
from megatron_aspo.tasks.options import DataOptions

PART_PROBLEMS = 16
"""Default number of problems per part, also during training: in deterministic evaluations the parts decide what is batched together."""

Temperature = Annotated[
    NonNegative[float],
    # vLLM would silently raise a smaller one to 0.01.
    Condition(lambda temperature: temperature == 0 or temperature >= 0.01, "must be 0 (greedy) or at least 0.01"),
]


@options("evaluation")
class EvaluationOptions:
    draws: NonNegative[int] = 16
    """Responses sampled for each held-out prompt; 0 turns evaluation off."""
    temperature: Temperature = 1.0
    """Sampling temperature of evaluations."""
    every: NonNegative[int] = 0
    """Also evaluate after every N steps; 0 evaluates only before and after training."""


@options("engine")
class EngineChoice:
    """The engines of an evaluation; each option has the meaning that it has in `rollout`."""

    engines: Positive[int] = 1
    """Number of vLLM engines. For an endpoint: none are started."""
    tensor_parallel: Positive[int] = 1
    """Devices of one engine."""
    dtype: Annotated[str, Choice("auto", "float32", "bfloat16")] = "auto"
    """`float32 | bfloat16`; `auto` takes that of the model's tensors."""
    max_running_requests: Positive[int] = 64
    """Upper bound on the concurrent requests of one engine, or of an endpoint."""
    kv_cache_gib: NonNegative[float] = 0.0
    """Key-value cache of one engine, in GiB; 0 makes room for 8 responses of full length, or for as many as fit the memory."""
    threads: NonNegative[int] = 0
    """CPU threads of one engine; 0 shares the node's cores evenly."""


@options("")
class EvalSettings:
    """Prompts, sampling and grading of an evaluation. A named protocol sets these values; `key=value` on the command line replaces one."""

    task: str = "dataset"
    """`dataset`, or the name of a task that makes its prompts, whose held-out prompts are used."""
    kind: str = ""
    """Kind of the data files (`tools/prepare_data.py`), whose rows become prompts; empty: rows with prompt and ground_truth."""
    template: str = ""
    """Name of a prompt template, or the path of a file with one; empty: the kind's. Rows that have a prompt keep it."""
    problems: NonNegative[int] = 0
    """Required number of problems; 0: any."""
    first_date: str = ""
    """First contest date, inclusive; empty: the kind's."""
    last_date: str = ""
    """Last contest date, inclusive; empty: the kind's."""
    samples: Positive[int] = 1
    """Responses to each problem: the n of avg@n."""
    temperature: Temperature = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1), Rule("must be above 0 and at most 1")] = 1.0
    """Tokens are drawn from the smallest set of most likely ones that has this probability."""
    max_response_tokens: Positive[int] = 32768
    """A longer response is truncated."""
    stop: list[str] = field(default_factory=list)
    """A response ends before the first of these strings."""
    pass_at: list[int] = field(default_factory=list)
    """Each k of pass@k; none is more than `samples`."""
    majority_at: list[int] = field(default_factory=list)
    """Each k of maj@k; none is more than `samples`. The reward must report the answer that it compares."""
    seed: int = 0
    """Seed of sampling, and of a task that makes its prompts."""
    deterministic: bool = False
    """Generate one part after the other, with a fixed share for each engine, so that a resumed evaluation gives the same tokens."""
    part_problems: Positive[int] = PART_PROBLEMS
    """Problems of one Parquet part, the unit that a killed evaluation has to generate again."""
    data: DataOptions = field(default_factory=DataOptions)
    """Data files (`data.eval_path`), chat template and reward, as in a recipe."""
    engine: EngineChoice = field(default_factory=EngineChoice)

    @property
    def max_model_len(self) -> int:
        """The longest prompt plus response, in tokens."""
        return self.data.max_prompt_tokens + self.max_response_tokens

    def rollout(self, dtype: str) -> RolloutOptions:
        """Return the options of an engine pool, without a cache that is still to be chosen. dtype: the value of `auto`."""
        engine = self.engine
        return RolloutOptions(
            engines=engine.engines,
            tensor_parallel=engine.tensor_parallel,
            dtype=dtype if engine.dtype == "auto" else engine.dtype,
            max_response_tokens=self.max_response_tokens,
            max_running_requests=engine.max_running_requests,
            kv_cache_gib=engine.kv_cache_gib or RolloutOptions.kv_cache_gib,
            threads=engine.threads,
        )


def check_settings(settings: EvalSettings, server_reward: str = "") -> None:
    """Raise UserError for settings that contradict each other or have no effect. server_reward: as for `check_rewards`."""
    require(
        settings.temperature > 0 or settings.samples == 1,
        f"samples={settings.samples} with temperature=0 would draw the same response each time; set temperature, or samples=1",
    )
    for name in ("pass_at", "majority_at"):
        for k in getattr(settings, name):
            require(
                1 <= k <= settings.samples,
                f"{name}={getattr(settings, name)}: k={k} needs that many samples and there are {settings.samples}; raise samples, or drop "
                "it",
            )
    require("" not in settings.stop, "stop has an empty string, which would end every response at once; remove it")
    for name in ("template", "first_date", "last_date"):
        require(
            settings.kind or not getattr(settings, name),
            f"{name}={getattr(settings, name)} has no effect without a kind of data files, whose rows it is about; set kind, or remove it",
        )
    require(
        settings.task == "dataset" or not settings.kind,
        f"kind={settings.kind} is about data files, which task={settings.task} has none of; remove it",
    )
    check_rewards(settings.data, server_reward)


def check_evaluation(evaluation: EvaluationOptions) -> None:
    """Raise UserError for evaluations during training that would sample nothing."""
    require(
        not evaluation.every or evaluation.draws > 0,
        f"evaluation.every={evaluation.every} evaluates while training, but evaluation.draws=0 draws nothing; set both or neither",
    )
