"""Tasks by name: where prompts come from and how responses to them are scored.

To add a task: write a class with the methods of `Task` and the two constructors used below, and put it into `TASKS`.
"""

import difflib
from typing import Protocol

from megatron_aspo.data.encoder import PromptEncoder
from megatron_aspo.data.jsonl import JsonlTask
from megatron_aspo.data.options import DataOptions
from megatron_aspo.data.procedural import LargestOfThree, SingleDigitAddition
from megatron_aspo.data.records import Prompt
from megatron_aspo.errors import UserError
from megatron_aspo.rewards.result import Reward, RewardResult


class Task(Protocol):
    name: str

    def prompt(self, index: int) -> Prompt:
        """Training prompt number `index` (from 0, without end): a function of the task's options, its seed and `index` alone."""

    def held_out(self) -> list[Prompt]:
        """The prompts of an evaluation, none of which is a training prompt; always the same for the same options and seed."""

    def reward(self, prompt: Prompt, response: str) -> RewardResult:
        """The score of `response`, decoded without special tokens. User code runs here: see `rewards/worker.py` for where to call it."""


TASKS = {task.name: task for task in (SingleDigitAddition, LargestOfThree, JsonlTask)}


def build_task(name: str, options: DataOptions, encoder: PromptEncoder, seed: int) -> Task:
    """Raises UserError for an unknown name, options that do not fit the task, and faulty data."""
    if options.held_out_prompts < 0:
        raise UserError(f"data.held_out_prompts={options.held_out_prompts} is negative; set 0 or more")
    return _find(name)(options, encoder, seed)


def build_reward(name: str, options: DataOptions) -> Reward:
    """The task's reward alone: needs no tokenizer and reads no data. Raises UserError as `build_task` does."""
    return _find(name).build_reward(options)


def _find(name: str) -> type[SingleDigitAddition] | type[LargestOfThree] | type[JsonlTask]:
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"task={name} is unknown; {hint}tasks: {', '.join(TASKS)}")
    return TASKS[name]
