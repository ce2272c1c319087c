"""Options of evaluations: of those during training, and of `megatron-aspo eval`."""

from dataclasses import dataclass, field

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.options import DataOptions
from megatron_aspo.rollout.options import RolloutOptions

PART_PROBLEMS = 16
"""Problems of a part by default. The same during training: in deterministic evaluations the parts decide what is computed in one batch."""


@dataclass(frozen=True)
class EvaluationOptions:
    draws: int = 16
    """Responses sampled for each held-out prompt; 0 turns evaluation off."""
    temperature: float = 1.0
    """Sampling temperature of evaluations."""
    every: int = 0
    """Also evaluate after every N steps; 0 evaluates only before and after training."""


@dataclass(frozen=True)
class EngineChoice:
    """The engines of an evaluation; each option as `rollout` has it."""

    engines: int = 1
    """Number of vLLM engines. For an endpoint: none are started."""
    tensor_parallel: int = 1
    """Devices of one engine."""
    dtype: str = "auto"
    """`float32 | bfloat16`; `auto` takes that of the model's tensors."""
    max_running_requests: int = 64
    """Upper bound on the requests under way: on one engine, or at an endpoint."""
    kv_cache_gib: float = 0.0
    """Key-value cache of one engine, in GiB; 0 makes room for 8 responses of full length, or for as many as the memory has room for."""
    threads: int = 0
    """CPU threads of one engine; 0 shares the node's cores evenly."""


@dataclass(frozen=True)
class EvalSettings:
    """Prompts, sampling and grading of an evaluation. A named protocol sets these values; `key=value` on the command line replaces one."""

    task: str = "dataset"
    """`dataset`, or the name of a task that makes its prompts, whose held-out prompts are asked."""
    kind: str = ""
    """Kind of the data files (`tools/prepare_data.py`), whose rows become prompts; empty: rows with prompt and ground_truth."""
    template: str = ""
    """Name of a prompt template, or the path of a file with one; empty: the kind's. Rows that have a prompt keep it."""
    problems: int = 0
    """Number of problems that there must be; 0: any."""
    first_date: str = ""
    """First contest date that is asked, inclusive; empty: the kind's."""
    last_date: str = ""
    """Last contest date that is asked, inclusive; empty: the kind's."""
    samples: int = 1
    """Responses to each problem: the n of avg@n."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Tokens are drawn from the smallest set of most likely ones that has this probability."""
    max_response_tokens: int = 32768
    """A longer response is truncated."""
    stop: list[str] = field(default_factory=list)
    """A response ends before the first of these strings."""
    pass_at: list[int] = field(default_factory=list)
    """Each k of pass@k; none is more than `samples`."""
    majority_at: list[int] = field(default_factory=list)
    """Each k of maj@k; none is more than `samples`. The reward must give the answer that it compares."""
    seed: int = 0
    """Seed of sampling, and of a task that makes its prompts."""
    deterministic: bool = False
    """Generate one part after the other, each engine with a fixed share of it, so that a resumed evaluation gives the same tokens."""
    part_problems: int = PART_PROBLEMS
    """Problems of one Parquet part: what a killed evaluation has to generate again."""
    data: DataOptions = field(default_factory=DataOptions)
    """Data files (`data.eval_path`), chat template and reward, as in a recipe."""
    engine: EngineChoice = field(default_factory=EngineChoice)

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus response, in tokens."""
        return self.data.max_prompt_tokens + self.max_response_tokens

    def rollout(self, dtype: str) -> RolloutOptions:
        """Return the options of an engine pool. dtype: what `auto` stands for."""
        engine = self.engine
        return RolloutOptions(
            engines=engine.engines,
            tensor_parallel=engine.tensor_parallel,
            dtype=dtype if engine.dtype == "auto" else engine.dtype,
            max_response_tokens=self.max_response_tokens,
            max_running_requests=engine.max_running_requests,
            kv_cache_gib=engine.kv_cache_gib,
            threads=engine.threads,
        )

    def check(self) -> None:
        """Raise UserError, in one line with the cure, for the first value that cannot be."""
        engine = {f"engine.{name}": getattr(self.engine, name) for name in ("engines", "tensor_parallel", "max_running_requests")}
        positive = engine | {name: getattr(self, name) for name in ("samples", "max_response_tokens", "part_problems")}
        positive |= {"data.reward_workers": self.data.reward_workers}
        for name, value in positive.items():
            _require(value > 0, f"{name}={value} must be greater than 0")
        _require(self.problems >= 0, f"problems={self.problems} must not be negative")
        for name in ("threads", "kv_cache_gib"):
            _require((value := getattr(self.engine, name)) >= 0, f"engine.{name}={value} must not be negative")
        _require(0 < self.top_p <= 1, f"top_p={self.top_p:g} must be above 0 and at most 1")
        # vLLM would raise a smaller temperature to 0.01 by itself.
        _require(self.temperature == 0 or self.temperature >= 0.01, f"temperature={self.temperature:g} must be 0 (greedy) or at least 0.01")
        _require(
            self.temperature > 0 or self.samples == 1,
            f"samples={self.samples} with temperature=0 would draw the same response each time; set temperature, or samples=1",
        )
        for name in ("pass_at", "majority_at"):
            for k in getattr(self, name):
                _require(
                    1 <= k <= self.samples,
                    f"{name}={getattr(self, name)}: k={k} needs that many samples and there are {self.samples}; raise samples, or drop it",
                )
        _require("" not in self.stop, "stop has an empty string, which would end every response at once; remove it")
        dtypes = ("auto", "float32", "bfloat16")
        _require(self.engine.dtype in dtypes, f"engine.dtype={self.engine.dtype} is not known; it is one of {', '.join(dtypes)}")
        for name in ("template", "first_date", "last_date"):
            _require(
                bool(self.kind) or not getattr(self, name),
                f"{name}={getattr(self, name)} has no effect without a kind of data files, whose rows it is about; set kind, or remove it",
            )
        _require(
            self.task == "dataset" or not self.kind, f"kind={self.kind} is about data files, which task={self.task} has none of; remove it"
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
