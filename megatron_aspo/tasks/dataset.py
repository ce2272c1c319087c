"""The task `dataset`: prompts from files, directories and the Hugging Face hub (`sources.py`), in the layouts of `layouts.py`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.encoder import Encoder
from megatron_aspo.data.order import choose_source, shuffled_position
from megatron_aspo.data.records import Prompt
from megatron_aspo.data.sources import Row, read_rows, short_name
from megatron_aspo.data.store import PromptStore
from megatron_aspo.rewards.choice import RewardChoice
from megatron_aspo.rewards.named import CHECKS, build_rewards
from megatron_aspo.rewards.result import Reward
from megatron_aspo.tasks.layouts import WANTED, Problem, understand
from megatron_aspo.tasks.options import REASONING_GYM_OPTIONS, DataOptions

TRAIN, EVAL = "train", "eval"


@dataclass(frozen=True)
class Part:
    """The prompts of one location: positions [start, stop) of the store."""

    location: str
    start: int
    stop: int
    too_long: int
    """Rows left out by `data.drop_long_prompts`."""


class DatasetTask:
    """Training prompts of `data.path` in shuffled epochs, held-out prompts of `data.eval_path` in order, the reward `data.reward`.

    With `data.weights` each location has its own epochs and its share of the draws.
    """

    name: ClassVar[str] = "dataset"

    def __init__(self, options: DataOptions, encoder: Encoder, seed: int):
        """Read and check all prompts. Raises UserError naming file and row of the first faulty one."""
        if not options.path:
            raise UserError("task=dataset needs data.path, the files of training prompts; set it")
        _require_reward(options)
        _check_weights(options)
        self._seed, self._weights = seed, options.weights
        self._store = PromptStore()
        loader = Loader(self._store, options, encoder)
        self._training = loader.load(TRAIN, options.path)
        self.data_sha256 = self._store.sha256
        """A digest of the training prompts and their ground truths."""
        self._held_out = loader.load(EVAL, options.eval_path)
        encoder.check_options_used()

    @classmethod
    def build_reward(cls, options: DataOptions) -> Reward:
        """Return the reward of `data.reward`, or the weighted sum of `data.rewards`.

        Raises UserError if neither is set, or a reward cannot be loaded.
        """
        options.refuse(cls.name, *REASONING_GYM_OPTIONS)
        _require_reward(options)
        return build_rewards(options)

    def prompt(self, index: int) -> Prompt:
        """Return training prompt number `index`. Its ground truth is a `StoredAnswer`, which `store.with_answer` reads."""
        if not self._weights:
            return self._store.read(shuffled_position(self._seed, index, self._training[-1].stop))
        source, draw = choose_source(self._weights, index)
        part = self._training[source]
        return self._store.read(part.start + shuffled_position(f"{self._seed} {source}", draw, part.stop - part.start))

    def held_out(self) -> list[Prompt]:
        """Return the held-out prompts in order. Raises UserError if `data.eval_path` is empty."""
        if not self._held_out:
            raise UserError("task=dataset needs data.eval_path, files of held-out prompts, to evaluate; set it, or evaluation.draws=0")
        return [self._store.read(position) for part in self._held_out for position in range(part.start, part.stop)]

    @property
    def remarks(self) -> list[str]:
        """Report lines: rows left out as too long, repeated prompts, held-out prompts that are also training prompts."""
        parts = [*self._training, *self._held_out]
        long = [f"{part.location}: {part.too_long} rows left out, longer than data.max_prompt_tokens" for part in parts if part.too_long]
        return [*long, *find_repetitions(self._store)]


class Loader:
    """Reads locations into a store, one row at a time."""

    def __init__(
        self,
        store: PromptStore,
        options: DataOptions,
        encoder: Encoder,
        read: Callable[[str], Iterable[Row]] = lambda location: read_rows(location, WANTED),
    ):
        """read: yields the rows of a location, in one of the known layouts."""
        self._store, self._options, self._encoder, self._read = store, options, encoder, read
        self._choice = RewardChoice(options)

    def load(self, split: str, locations: Sequence[str]) -> list[Part]:
        """Add all rows, with ids `SPLIT/ID`, or `SPLIT/NAME/ID` if there are several locations. Raises UserError for a faulty row."""
        names = make_distinct([short_name(location) for location in locations])
        return [self._load_one(split, location, names[n] if len(names) > 1 else "") for n, location in enumerate(locations)]

    def _load_one(self, split: str, location: str, name: str) -> Part:
        start, too_long = len(self._store), 0
        prefix = f"{split}/{name}/" if name else f"{split}/"
        where_by_id: dict[str, str] = {}
        for row in self._read(location):
            problem = understand(row, DatasetTask.name)
            prompt_id = prefix + str(row.number if problem.id is None else problem.id)
            if other := where_by_id.get(prompt_id):
                raise UserError(f"{row.where}: id {row.fields.get('id', row.number)!r} is also that of {other}; ids must differ")
            where_by_id[prompt_id] = row.where
            tokens = self._encode(problem, row)
            if len(tokens) > self._options.max_prompt_tokens and self._options.drop_long_prompts:
                too_long += 1
                continue
            self._check_length(len(tokens), row)
            self._check_truth(problem, row)
            prompt = Prompt(prompt_id, tokens, problem.text, problem.ground_truth, problem.data_source, problem.extra, row.number)
            self._store.add(split, row.where, prompt, problem.known_as)
        if len(self._store) == start:
            raise UserError(
                f"all {too_long} prompts of {location} are longer than data.max_prompt_tokens={self._options.max_prompt_tokens}; raise it"
                if too_long
                else f"{location} holds no prompts; expected rows with {WANTED}"
            )
        return Part(location, start, len(self._store), too_long)

    def _encode(self, problem: Problem, row: Row) -> tuple[int, ...]:
        try:
            return self._encoder.text(problem.text) if problem.messages is None else self._encoder.chat(problem.messages)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error

    def _check_length(self, length: int, row: Row) -> None:
        if not 1 <= length <= self._options.max_prompt_tokens:
            raise UserError(
                f"{row.where}: the prompt has {length} tokens, expected 1 to data.max_prompt_tokens={self._options.max_prompt_tokens}; "
                "shorten it, raise that, or leave such rows out with data.drop_long_prompts=true"
            )

    def _check_truth(self, problem: Problem, row: Row) -> None:
        if not self._choice:  # no reward is set: the data are only reported on
            return
        try:
            for name in self._choice.parts(problem.data_source):
                if check := CHECKS.get(name):
                    check(problem.ground_truth, problem.text)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error


def find_repetitions(store: PromptStore) -> list[str]:
    """Report training prompts that occur twice, and held-out prompts that are also training prompts, by tokens and by id."""
    found = []
    for column, what in (("hash", "text"), ("known_as", "id")):
        real = f"{column} <> ''"
        ((repeated,),) = store.query(f"SELECT count(*) - count(DISTINCT {column}) FROM prompts WHERE split = ? AND {real}", TRAIN)
        if repeated:
            first = store.query(
                f"SELECT min(location), max(location) FROM prompts WHERE split = ? AND {real} GROUP BY {column} HAVING count(*) > 1 "
                "ORDER BY min(position) LIMIT 1",
                TRAIN,
            )
            found.append(f"{repeated} training prompts have the {what} of an earlier one, such as {' and '.join(first[0])}")
        both = store.query(
            f"SELECT held.location, trained.location FROM prompts AS held JOIN prompts AS trained USING ({column}) WHERE held.split = ? "
            f"AND trained.split = ? AND held.{real} GROUP BY held.position ORDER BY held.position",
            EVAL,
            TRAIN,
        )
        if both:
            found.append(f"{len(both)} held-out prompts have the {what} of a training prompt, such as {' and '.join(both[0])}")
    return [f"data: {line}" for line in found]


def make_distinct(names: Sequence[str]) -> list[str]:
    """Return the names, with the number of the occurrence appended to those that repeat an earlier one."""
    return [name if name not in names[:n] else f"{name}-{names[: n + 1].count(name)}" for n, name in enumerate(names)]


def _require_reward(options: DataOptions) -> None:
    if not RewardChoice(options):
        raise UserError("task=dataset needs data.reward, which scores a response: math, code, or package.module:function; set it")


def _check_weights(options: DataOptions) -> None:
    if options.weights and len(options.weights) != len(options.path):
        raise UserError(
            f"data.weights has {len(options.weights)} numbers for {len(options.path)} locations in data.path; give one for each, or none"
        )
    if any(weight <= 0 for weight in options.weights):
        raise UserError(f"data.weights={options.weights}: each must be greater than 0; leave out the location instead")
