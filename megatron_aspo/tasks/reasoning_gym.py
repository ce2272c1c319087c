"""Tasks of the package reasoning-gym by name: `task: reasoning_gym:leg_counting`, with its parameters in `data.task_options`.

The package generates an entry's question and answer and scores responses. A score may be a fraction of 1: several tasks give credit for an
almost right answer, and the default gives credit for a right answer inside a longer one.
"""

import dataclasses
import hashlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_aspo.common.errors import UserError, nearest
from megatron_aspo.common.import_path import one_line
from megatron_aspo.data.encoder import Encoder
from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards.last_number import find_last_number
from megatron_aspo.rewards.result import Reward, RewardResult
from megatron_aspo.tasks.options import DATASET_OPTIONS, DataOptions

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

PREFIX = "reasoning_gym:"
EVALUATING = {
    "binary_matrix",
    "codeio",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
}
"""Tasks of reasoning-gym 0.1.25 whose score evaluates the response as Python, by `eval` or by SymPy's `parse_expr`."""
_NEEDS = {"game_of_life": "cellpylib", "game_of_life_halting": "cellpylib", "zebra_puzzles": "pycosat"}
"""Tasks that use a package without a wheel, which the other tasks do not need."""
_WITHOUT_WHEEL = ("cellpylib", "pycosat", "zss")
FORMATS = {
    "tags": "Give the final answer alone between <answer> and </answer>.",
    "last_number": "End with the answer, which is a number.",
}
"""Text appended to a question, for each `data.answer_format`."""
_TAGS = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
_ATTEMPTS = 100
"""Consecutive draws that may be held out. After that many the task is taken to have no other questions."""
_JUMP = 10_000_019
"""Offset from a held-out draw to its substitute; seeds stay below 2**32, as NumPy requires."""
_PROBES = 5
"""Draws that are generated twice and compared at the start."""


class ReasoningGymTask:
    """One task of the package; `task_class` makes the class of each name."""

    name: ClassVar[str]

    def __init__(self, options: DataOptions, encoder: Encoder, seed: int):
        """Raises UserError for parameters that the package does not take, and for fewer distinct questions than must be held out."""
        self.build_reward(options)
        self._encoder, self._options = encoder, options
        # The package gives entry i of seed s the random numbers of entry i + 1 of seed s - 1: nearby seeds would share their questions.
        mixed_seed = int.from_bytes(hashlib.sha256(f"{self.name} {seed}".encode()).digest()[:4], "big") >> 2
        self._dataset = _make(self.name, options.task_options, mixed_seed)
        self._held_out = self._choose_held_out(options.held_out_prompts)
        self._questions = {prompt.ground_truth["question"] for prompt in self._held_out}
        self._check_repeatable()

    @classmethod
    def build_reward(cls, options: DataOptions) -> Reward:
        """Return the reward. Raises UserError for a task that is unknown or evaluates responses, and for options without effect in it."""
        options.refuse(cls.name, *DATASET_OPTIONS)
        dataset = _make(cls.name, options.task_options, 0)
        return _Score(dataset, options.answer_format)

    def prompt(self, index: int) -> Prompt:
        """Return training prompt number `index`. Raises UserError if `_ATTEMPTS` questions in a row are held out."""
        for attempt in range(_ATTEMPTS):
            prompt = self._make_prompt(len(self._held_out) + index + attempt * _JUMP)
            if prompt.ground_truth["question"] not in self._questions:
                return prompt
        raise UserError(
            f"task={self.name}: {_ATTEMPTS} questions in a row are held out; lower data.held_out_prompts={self._options.held_out_prompts}, "
            "or widen data.task_options"
        )

    def held_out(self) -> list[Prompt]:
        return list(self._held_out)

    remarks: Sequence[str] = ()
    data_sha256 = ""

    def _choose_held_out(self, count: int) -> list[Prompt]:
        chosen: dict[str, Prompt] = {}
        for draw in range(count):
            for attempt in range(_ATTEMPTS):
                prompt = self._make_prompt(draw + attempt * _JUMP)
                if prompt.ground_truth["question"] not in chosen:
                    break
            else:
                raise UserError(
                    f"task={self.name} has hardly more than {len(chosen)} different questions; lower data.held_out_prompts={count}, or "
                    "widen data.task_options"
                )
            chosen[prompt.ground_truth["question"]] = prompt
        return list(chosen.values())

    def _make_prompt(self, draw: int) -> Prompt:
        entry = self._entry(draw)
        text = f"{entry['question'].strip()}\n\n{FORMATS[self._options.answer_format]}"
        tokens = self._encoder.chat([{"role": "user", "content": text}])
        if len(tokens) > self._options.max_prompt_tokens:
            raise UserError(
                f"a prompt of task={self.name} has {len(tokens)} tokens; raise data.max_prompt_tokens={self._options.max_prompt_tokens} to "
                "that, or ask for smaller problems with data.task_options"
            )
        return Prompt(f"{self.name}/{draw}", tokens, text, entry, self.name, {}, draw)

    def _entry(self, draw: int) -> dict[str, Any]:
        try:
            return self._dataset[draw]
        except Exception as error:  # some generators fail with parameters that their own checks accept
            raise UserError(
                f"task={self.name} cannot make entry {draw} with data.task_options={self._options.task_options} ({one_line(error)}); "
                "change them"
            ) from error

    def _check_repeatable(self) -> None:
        for draw in range(_PROBES):
            if self._entry(draw)["question"] != self._entry(draw)["question"]:
                raise UserError(f"task={self.name} makes another question at every call: a resumed run would differ; choose another task")


def task_class(name: str) -> type[ReasoningGymTask]:
    """Return the class of the task `name`, prefix included: `reasoning_gym:leg_counting`."""
    return type("ReasoningGymTask", (ReasoningGymTask,), {"name": name})


class _Score:
    def __init__(self, dataset: "ProceduralDataset", answer_format: str):
        self._dataset, self._format = dataset, answer_format

    def __call__(self, prompt: Prompt, response: str) -> RewardResult:
        if self._format == "tags":
            found = _TAGS.findall(response)
            answer = found[-1] if found else None
        else:
            answer = find_last_number(response)
        if answer is None:
            return RewardResult(0.0, "no answer", {})
        score = float(self._dataset.score_answer(answer=answer, entry=prompt.ground_truth))
        return RewardResult(score, f"answer {answer[:100]!r}", {})


def _make(name: str, parameters: dict[str, Any], seed: int) -> "ProceduralDataset":
    dataset = name.removeprefix(PREFIX)
    try:
        missing = _import_package()
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise UserError(f"task={name} needs the package reasoning-gym ({one_line(error)}); pip install reasoning-gym==0.1.25") from error
    if dataset not in DATASETS:
        raise UserError(f"task={name}: reasoning-gym has no task {dataset}; {nearest(dataset, DATASETS)}")
    if dataset in EVALUATING:
        raise UserError(f"task={name}: its score evaluates the response as Python code, outside a sandbox; choose another task")
    if (package := _NEEDS.get(dataset)) in missing:
        raise UserError(f"task={name} needs the package {package}, which is not installed; pip install {package}")
    known = [field.name for field in dataclasses.fields(DATASETS[dataset][1]) if field.name not in ("seed", "size")]
    for key in parameters:
        if key not in known:
            raise UserError(f"data.task_options.{key} is no parameter of task={name}; {nearest(key, known)}")
    try:
        return create_dataset(dataset, **parameters, seed=seed, size=2**31 - 1)
    except Exception as error:  # its checks are assertions
        raise UserError(f"task={name} refuses data.task_options={parameters} ({one_line(error)}); change them") from error


def _import_package() -> list[str]:
    """Import reasoning-gym; return which packages without wheels are missing.

    reasoning-gym 0.1.25 imports all of them at its own import, although few of its tasks use them. During that import an empty module
    replaces each missing one.
    """
    missing = [name for name in _WITHOUT_WHEEL if importlib.util.find_spec(name) is None]
    sys.modules.update({name: ModuleType(name) for name in missing})
    try:
        importlib.import_module("reasoning_gym.factory")
    finally:
        for name in missing:
            del sys.modules[name]
    return missing
