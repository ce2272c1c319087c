"""The section `data` of a recipe: where prompts come from, how they are written, and what scores the responses."""

from dataclasses import field
from typing import Annotated, Any

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.options import Choice, Positive, first_changed, options
from megatron_aspo.data.options import PromptOptions
from megatron_aspo.rewards.options import RewardOptions

DATASET_OPTIONS = ("path", "weights", "eval_path", "drop_long_prompts", "reward", "rewards", "reward_wrong_score")
"""Options that `task: dataset` alone has a use for."""
REASONING_GYM_OPTIONS = ("task_options", "answer_format")
"""Options that `reasoning_gym:NAME` tasks alone have a use for."""


@options("data")
class SourceOptions:
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
    answer_format: Annotated[str, Choice("tags", "last_number")] = "tags"
    """The form of answer that a `reasoning_gym:NAME` task requests and scores: `tags`, the text between `<answer>` and `</answer>`; or
    `last_number`, the last number of the response."""
    held_out_prompts: Positive[int] = 20
    """Lower bound on the prompts that are kept out of training by a task that makes its prompts."""


@options("data")
class DataOptions(RewardOptions, PromptOptions, SourceOptions):
    """All options of the section."""

    def refuse(self, task: str, *names: str) -> None:
        """Raise UserError for the first of these options that is not at its default: the task has no use for it."""
        if name := first_changed(self, names):
            raise UserError(
                f"data.{name}={getattr(self, name)} has no use in task={task}; remove it, or set "
                f"task={'dataset' if name in DATASET_OPTIONS else 'reasoning_gym:NAME'}"
            )
