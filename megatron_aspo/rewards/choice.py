"""The rewards of each data source and their weights: read from `data.reward` or `data.rewards`, checked before a run starts."""

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_aspo.common.errors import UserError
from megatron_aspo.rewards.by_source import reward_of_source

if TYPE_CHECKING:
    from megatron_aspo.rewards.options import RewardOptions

BY_SOURCE = "by_source"
OTHERS = "*"
"""Key in `data.rewards` for every data source that is not named."""
NAMES = ("code", "math", "format", "repetition", "remote")
"""Names of the built-in rewards; `named.py` builds them."""


class RewardChoice:
    """The parts of each data source's reward."""

    def __init__(self, options: "RewardOptions"):
        """Raises UserError for an invalid table or name."""
        if options.reward and options.rewards:
            raise UserError(f"data.reward={options.reward} and data.rewards both choose the reward; remove one of them")
        self._by_source = options.reward == BY_SOURCE
        self._rows: dict[str, Mapping[str, float]] = {}
        if options.reward and not self._by_source:
            _check_name(options.reward, "data.reward")
            self._rows = {OTHERS: {options.reward: 1.0}}
        elif options.rewards:
            self._rows = {source: _read_row(source, row) for source, row in options.rewards.items()}

    def __bool__(self) -> bool:
        """Return whether any reward is chosen."""
        return self._by_source or bool(self._rows)

    @property
    def single(self) -> str:
        """The one reward of every row; empty if it depends on the row or has several parts."""
        row = self._rows.get(OTHERS, {})
        return next(iter(row)) if len(self._rows) == len(row) == 1 and list(row.values()) == [1.0] else ""

    @property
    def names(self) -> set[str]:
        """All rewards that rows may need."""
        return {"code", "math"} if self._by_source else {name for row in self._rows.values() for name in row}

    def parts(self, data_source: str) -> Mapping[str, float]:
        """Return the names of a row's rewards, each with its weight. Raises UserError for a data source without a reward."""
        if self._by_source:
            if name := reward_of_source(data_source):
                return {name: 1.0}
            raise UserError(f"data_source={data_source!r} names no reward; choose one with data.reward, or for each source in data.rewards")
        row = self._rows.get(data_source) or self._rows.get(OTHERS)
        if row is None:
            near = difflib.get_close_matches(data_source, self._rows, n=1)
            hint = f"did you mean data_source={near[0]!r}? else " if near else ""
            raise UserError(f"data_source={data_source!r} has no reward in data.rewards; {hint}add it there, or '{OTHERS}' for all others")
        return row


def _read_row(source: str, row: object) -> Mapping[str, float]:
    key = f"data.rewards.{source}"
    if isinstance(row, str):
        row = {row: 1.0}
    if not isinstance(row, dict) or not row:
        raise UserError(f"{key}={row!r} must be the name of a reward, or a mapping of names to weights")
    for name, weight in row.items():
        _check_name(name, key)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < abs(weight) < float("inf"):
            raise UserError(f"{key}.{name}={weight!r} is no weight; give a finite number that is not 0")
    return {name: float(weight) for name, weight in row.items()}


def _check_name(name: object, key: str) -> None:
    if not isinstance(name, str) or (":" not in name and name not in NAMES):
        near = difflib.get_close_matches(str(name), [*NAMES, BY_SOURCE], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{key}: {name} is no reward; {hint}valid: {', '.join(NAMES)}, or package.module:function")
