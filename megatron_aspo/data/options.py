"""Options of the data room."""

from dataclasses import dataclass, field, fields
from typing import Any

from megatron_aspo.common.errors import UserError
from megatron_aspo.rewards.code.options import CodeOptions
from megatron_aspo.rewards.math.options import MathOptions
from megatron_aspo.rewards.service.options import ServiceOptions

DATASET_OPTIONS = ("path", "weights", "eval_path", "drop_long_prompts", "reward", "rewards", "reward_wrong_score")
"""Options that `task: dataset` alone has a use for."""
REASONING_GYM_OPTIONS = ("task_options", "answer_format")
"""Options that `reasoning_gym:NAME` tasks alone have a use for."""


@dataclass(frozen=True)
class DataOptions:
    path: list[str] = field(default_factory=list)
    """Locations of the training prompts of `task: dataset`: files (JSONL, a JSON array, Parquet), directories with a Hugging Face data set,
    or `hub:OWNER/NAME[:SUBSET]`; directories and hub names take `@SPLIT` at their end. One location may be given as text, not a list."""
    weights: list[float] = field(default_factory=list)
    """One number for each location of `data.path`: its share of the training prompts, each location in epochs of its own. Empty: the
    prompts of all locations are shuffled together, and each is drawn once an epoch."""
    eval_path: list[str] = field(default_factory=list)
    """Locations of the held-out prompts, written as in `data.path`; required by `task: dataset` when `evaluation.draws` is above 0."""
    drop_long_prompts: bool = False
    """Leave out prompts of more than `data.max_prompt_tokens` tokens, and report how many; else the first is an error."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Parameters of a `reasoning_gym:NAME` task, such as `{min_animals: 2}`; those of reasoning-gym's configuration of that name."""
    answer_format: str = "tags"
    """The form of answer that a `reasoning_gym:NAME` task requests and scores: `tags`, the text between `<answer>` and `</answer>`; or
    `last_number`, the last number of the response."""
    reward: str = ""
    """The reward, needed by `task: dataset`: `code` for programs graded by tests, `math` for an answer in `\\boxed{}`, `by_source` for one
    of these two by the name of the row's data source, `remote` for a grading server, or `package.module:function`."""
    rewards: dict[str, Any] = field(default_factory=dict)
    """In place of `data.reward`, the rewards of each data source with their weights: `{gsm8k: {math: 1, format: 0.2}, "*": code}`. `*` is
    every other source. Beside those of `data.reward` there are `format`, `repetition` and `remote`."""
    reward_wrong_score: float = 0.0
    """Score of a wrong response by `code` and `math`, where a right one has 1: 0 or -1, say."""
    code: CodeOptions = field(default_factory=CodeOptions)
    math: MathOptions = field(default_factory=MathOptions)
    service: ServiceOptions = field(default_factory=ServiceOptions)
    format_tags: list[str] = field(default_factory=lambda: ["think"])
    """Tags that `format` requires, each once and in this order."""
    repetition_ngram: int = 20
    """Words of the sequences that `repetition` counts when they occur again; its score is minus their share."""
    reward_workers: int = 1
    """Processes that score responses."""
    reward_resource: str = ""
    """Custom Ray resource of which each reward worker takes 1: workers run only on nodes that were started with it."""
    reward_timeout_s: float = 60.0
    """Longest time to score one response, in seconds. A reward that takes longer is killed and the response gets `reward_failure_score`."""
    reward_failure_score: float = 0.0
    """Reward of a response on which the reward timed out, or crashed its process twice, or failed where `reward_on_error` is `score`."""
    reward_on_error: str = "stop"
    """The action when a reward raises an exception or returns no finite number: `stop` ends the run and names the prompt; `score` gives
    the response `reward_failure_score`, and names it."""
    reward_memory_gib: float = 0.0
    """Upper bound of the memory of a reward's process, in GiB; 0: none. One that exceeds it counts as crashed, and is replaced."""
    chat_template: str = ""
    """Path of a Jinja chat template that takes the place of the tokenizer's, in the exported model too."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, such as `{enable_thinking: false}`."""
    system_prompt: str = ""
    """System message of chat prompts that have none of their own."""
    max_prompt_tokens: int = 2048
    """Longest prompt, chat template included. A longer one is an error at the start of the run, unless `data.drop_long_prompts` is set."""
    held_out_prompts: int = 20
    """Lower bound on the prompts that are kept out of training by a task that makes its prompts."""

    def refuse(self, task: str, *names: str) -> None:
        """Raise UserError for the first of these options that is set: the task has no use for it."""
        defaults = {field.name: getattr(DataOptions(), field.name) for field in fields(self)}
        for name in names:
            if (value := getattr(self, name)) != defaults[name]:
                raise UserError(
                    f"data.{name}={value} has no use in task={task}; remove it, or set "
                    f"task={'dataset' if name in DATASET_OPTIONS else 'reasoning_gym:NAME'}"
                )
