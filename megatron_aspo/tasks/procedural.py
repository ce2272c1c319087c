"""Procedurally generated tasks: arithmetic that a small chat model learns within minutes. An answer is right or wrong."""

import itertools
import random
from collections.abc import Sequence
from typing import ClassVar

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.encoder import Encoder
from megatron_aspo.data.order import shuffled_position
from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards.last_number import last_number
from megatron_aspo.rewards.result import Reward, RewardResult
from megatron_aspo.tasks.options import DATASET_OPTIONS, REASONING_GYM_OPTIONS, DataOptions


class ProceduralTask:
    """Base of the procedural tasks. A subclass chooses the held-out questions and training prompt `index`."""

    name: ClassVar[str]
    remarks: Sequence[str] = ()
    data_sha256 = ""

    def __init__(self, options: DataOptions, encoder: Encoder, seed: int):
        self._encoder = encoder
        self._max_prompt_tokens = options.max_prompt_tokens
        self.build_reward(options)  # refuses options without effect in these tasks
        self._seed = seed

    @classmethod
    def build_reward(cls, options: DataOptions) -> Reward:
        """Return the reward. Raises UserError for options without effect in these tasks."""
        options.refuse(cls.name, *DATASET_OPTIONS, *REASONING_GYM_OPTIONS)
        return _score_last_number

    def _make_prompt(self, key: str, position: int, question: str, answer: int) -> Prompt:
        text = f"{question} Answer with only the number."
        token_ids = self._encoder.chat([{"role": "user", "content": text}])
        if len(token_ids) > self._max_prompt_tokens:
            raise UserError(
                f"a prompt of task={self.name} has {len(token_ids)} tokens; raise data.max_prompt_tokens={self._max_prompt_tokens} to that"
            )
        return Prompt(f"{self.name}/{key}", token_ids, text, answer, self.name, position=position)


class SingleDigitAddition(ProceduralTask):
    """Sums of two digits, 100 questions. A question is held out together with its mirror image, the operands exchanged."""

    name: ClassVar[str] = "single_digit_addition"

    def __init__(self, options: DataOptions, encoder: Encoder, seed: int):
        super().__init__(options, encoder, seed)
        unordered = list(itertools.combinations_with_replacement(range(10), 2))
        random.Random(f"held out {seed}").shuffle(unordered)
        self._held_out: list[tuple[int, int]] = []
        while unordered and len(self._held_out) < options.held_out_prompts:
            a, b = unordered.pop()
            self._held_out += sorted({(a, b), (b, a)})
        self._training = sorted({pair for a, b in unordered for pair in ((a, b), (b, a))})
        if not self._training:
            raise UserError(f"data.held_out_prompts={options.held_out_prompts} leaves none of 100 sums to train on; lower it")

    def prompt(self, index: int) -> Prompt:
        return self._ask(*self._training[shuffled_position(self._seed, index, len(self._training))])

    def held_out(self) -> list[Prompt]:
        return [self._ask(a, b) for a, b in self._held_out]

    def _ask(self, a: int, b: int) -> Prompt:
        return self._make_prompt(f"{a}+{b}", 10 * a + b, f"What is {a} + {b}?", a + b)


class LargestOfThree(ProceduralTask):
    """The largest of three different two-digit numbers. Held-out numbers are held out in every order."""

    name: ClassVar[str] = "largest_of_three"
    _NUMBERS = range(10, 100)
    _MOST_HELD_OUT = 10_000
    """Upper bound, out of 117,480 sets of three: far more than an evaluation needs, and few enough not to constrain training."""

    def __init__(self, options: DataOptions, encoder: Encoder, seed: int):
        super().__init__(options, encoder, seed)
        if options.held_out_prompts > self._MOST_HELD_OUT:
            raise UserError(f"data.held_out_prompts={options.held_out_prompts} is more than {self._MOST_HELD_OUT}; lower it")
        draw = random.Random(f"held out {seed}")
        self._held_out: dict[frozenset[int], list[int]] = {}
        while len(self._held_out) < options.held_out_prompts:
            numbers = draw.sample(self._NUMBERS, 3)
            self._held_out.setdefault(frozenset(numbers), numbers)

    def prompt(self, index: int) -> Prompt:
        draw = random.Random(f"draw {self._seed} {index}")
        while frozenset(numbers := draw.sample(self._NUMBERS, 3)) in self._held_out:
            pass
        return self._ask(numbers)

    def held_out(self) -> list[Prompt]:
        return [self._ask(numbers) for numbers in self._held_out.values()]

    def _ask(self, numbers: list[int]) -> Prompt:
        a, b, c = numbers
        return self._make_prompt(
            f"{a},{b},{c}", 10_000 * a + 100 * b + c, f"Which is the largest of the numbers {a}, {b} and {c}?", max(numbers)
        )


def _score_last_number(prompt: Prompt, response: str) -> RewardResult:
    return last_number(response, prompt.ground_truth)
