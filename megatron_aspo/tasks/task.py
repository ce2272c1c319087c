"""Tasks by name: a source of prompts and the reward of their responses.

To add a task: write a class with the methods of `Task`, the constructor and the `build_reward` of `TaskClass`, and put it into `TASKS`.
"""

import difflib
from collections.abc import Sequence
from typing import ClassVar, Protocol

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.encoder import Encoder
from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards.result import Reward
from megatron_aspo.tasks import reasoning_gym
from megatron_aspo.tasks.dataset import DatasetTask
from megatron_aspo.tasks.options import DataOptions
from megatron_aspo.tasks.procedural import LargestOfThree, SingleDigitAddition


class Task(Protocol):
    name: ClassVar[str]

    @property
    def remarks(self) -> Sequence[str]:
        """Report lines about the data, for the user to read before the run."""
        ...

    @property
    def data_sha256(self) -> str:
        """A digest of the training data; empty if the prompts follow from the options."""
        ...

    def prompt(self, index: int) -> Prompt:
        """Return training prompt number `index` (from 0, unbounded), which depends only on the task's options, its seed and `index`."""
        ...

    def held_out(self) -> list[Prompt]:
        """Return the prompts of an evaluation, none of which is a training prompt; the same for the same options and seed."""
        ...


class TaskClass(Protocol):
    """The class of a task. Its constructor raises UserError for options that do not fit the task, and for faulty data."""

    def __call__(self, options: DataOptions, encoder: Encoder, seed: int) -> Task: ...

    def build_reward(self, options: DataOptions) -> Reward:
        """Return the task's reward. Raises UserError for options without effect in the task."""
        ...


TASKS: dict[str, TaskClass] = {task.name: task for task in (SingleDigitAddition, LargestOfThree, DatasetTask)}


def build_task(name: str, options: DataOptions, encoder: Encoder, seed: int) -> Task:
    """Return the task. Raises UserError for an unknown name, options that do not fit the task, and faulty data."""
    return _find(name)(options, encoder, seed)


def build_reward(name: str, options: DataOptions) -> Reward:
    """Load the task's reward, which needs no tokenizer and no data. Raises UserError if it cannot be loaded.

    A custom reward's code runs from here on: during a run only `rewards/child.py` calls this, in a process that may hang or crash.
    """
    return _find(name).build_reward(options)


def _find(name: str) -> TaskClass:
    if name.startswith(reasoning_gym.PREFIX):
        return reasoning_gym.task_class(name)
    if name == "jsonl":
        raise UserError("task=jsonl has become task=dataset, which reads other formats too; change the name")
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"task={name} is unknown; {hint}tasks: {', '.join(TASKS)}, {reasoning_gym.PREFIX}NAME")
    return TASKS[name]
