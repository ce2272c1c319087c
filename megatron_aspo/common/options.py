"""Options as typed records: bounds and choices of a value are beside its field, and a value that breaks them is refused in one line.

    @options("trainer")
    class TrainerOptions:
        dtype: Annotated[str, Choice("float32", "bfloat16")] = "bfloat16"
        threads: NonNegative[int] = 0

makes a frozen dataclass that pydantic checks whenever one is constructed. Every refusal is a UserError such as
`trainer.threads=-1 must not be negative`. Rules that join several options are one function beside them.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import cache
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args, get_origin

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError, core_schema

from megatron_aspo.common.errors import UserError, nearest
from megatron_aspo.common.strict_yaml import number_if_one

T = TypeVar("T")
Kind = TypeVar("Kind")
Positive = Annotated[T, Field(gt=0)]
NonNegative = Annotated[T, Field(ge=0)]

_CONFIG = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid", defer_build=True)
_TYPE_NAMES = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    dict: "a mapping of names to values",
    list[str]: "a list of texts",
    list[float]: "a list of finite numbers",
    list[int]: "a list of whole numbers",
}
_COMPARISONS = {"gt": "greater than", "ge": "at least", "lt": "below", "le": "at most"}


class Choice:
    """The valid words, or numbers, of a field."""

    def __init__(self, *values: str | int):
        self.values = values

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.chain_schema([handler(source), core_schema.literal_schema([*self.values])])

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: Any) -> dict[str, Any]:
        return handler(core_schema.literal_schema([*self.values]))


@dataclasses.dataclass(frozen=True)
class Rule:
    """The words of a refusal, in place of those that follow from the bounds of its field."""

    words: str
    bound: str = ""
    """`gt`, `ge`, `lt` or `le`, which these words are about; empty: all of the field."""


class Condition:
    """A rule about one value that bounds cannot express, with the words of its refusal."""

    def __init__(self, holds: Callable[[Any], bool], words: str):
        self.words = words
        self._holds = holds

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, value: Any) -> Any:
        if not self._holds(value):
            raise PydanticCustomError("condition", "{words}", {"words": self.words})
        return value


def suggested(*words: str) -> FieldInfo:
    """Return the mark of a text that editors complete with these words, although others are valid too."""
    return Field(json_schema_extra={"anyOf": [{"enum": [*words]}, {"type": "string"}]})


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def options(section: str) -> Callable[[type[Kind]], type[Kind]]:
    """Return the decorator of a class of options. section: its key path in a recipe, such as `data.code`; empty for the whole.

    Constructing one raises UserError for the first value that is not of the field's type or breaks a bound.
    """

    def decorate(kind: Any) -> Any:
        kind.key_prefix = f"{section}." if section else ""
        validator: Any = classmethod(_refuse_in_one_line)
        kind.refuse_in_one_line = model_validator(mode="wrap")(validator)
        return checked_dataclass(frozen=True, config=_CONFIG)(kind)

    return decorate


def _refuse_in_one_line(kind: Any, given: Any, construct: Callable[[Any], Any]) -> Any:
    """Return the options that pydantic constructs. Raises UserError in place of its ValidationError."""
    try:
        return construct(given)
    except ValidationError as error:
        named = dict(zip(option_fields(kind), given.args or (), strict=False)) | (given.kwargs or {})
        first = error.errors(include_url=False)[0]
        if first["type"] == "unexpected_keyword_argument" or first["loc"][0] not in named:
            raise  # the mistake of a programmer
        raise UserError(_refusal(kind, first, named)) from None


def option_fields(kind: Any) -> Mapping[str, FieldInfo]:
    """Return the fields of a class of options by name, in order, with their types and bounds."""
    return kind.__pydantic_fields__


@cache
def default_of(kind: type, name: str) -> Any:
    """Return an option's default value; do not change it."""
    return option_fields(kind)[name].get_default(call_default_factory=True)


def first_changed(given: Any, names: Sequence[str] = ()) -> str:
    """Return the name of the first of these options, or of all, that is not at its default; empty if each is."""
    return next((name for name in names or option_fields(given) if getattr(given, name) != default_of(type(given), name)), "")


def build(kind: type[Kind], given: Mapping[str, Any]) -> Kind:
    """Return options from the nested values of a recipe over their defaults.

    Raises UserError for an unknown key, with the nearest valid one, for a value of another type, and for one out of bounds.
    """
    prefix, known = getattr(kind, "key_prefix"), option_fields(kind)  # noqa: B009 (set by `options`)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            raise UserError(f"unknown key {prefix}{key}; {nearest(str(key), known, prefix)}")
        wanted: Any = known[key].annotation
        if isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{key} is a section of keys, not the value {value!r}")
            values[key] = build(wanted, value)
        else:
            values[key] = _read(value, wanted)
    return kind(**values)


def _read(value: Any, wanted: Any) -> Any:
    """Return a value of a YAML file as the type that a field wants, where YAML reads such a value as another."""
    if get_origin(wanted) is list:
        (entry,) = get_args(wanted)
        if isinstance(value, list):
            return [_read(each, entry) for each in value]
        one = _read(value, entry)  # which may be without brackets
        return [] if value == "" else [one] if type(one) in (entry, int if entry is float else entry) else value
    if get_origin(wanted) is dict and isinstance(value, dict):
        return {name: number_if_one(entry) for name, entry in value.items()}
    if wanted is str and type(value) is date:  # YAML reads 2024-08-01 as one
        return value.isoformat()
    if wanted is float and type(value) is str:  # YAML reads 1e-6, without a point, as one
        with contextlib.suppress(ValueError):
            return float(value) if math.isfinite(float(value)) else value
    return value


def _refusal(kind: Any, error: ErrorDetails, named: Mapping[str, Any]) -> str:
    """Return pydantic's error about one option as one line. named: the values by option."""
    name = str(error["loc"][0])
    field, value, key = option_fields(kind)[name], named[name], f"{kind.key_prefix}{name}"
    wanted, context = field.annotation, error.get("ctx", {})
    if bound := next((bound for bound in _COMPARISONS if bound in context), ""):
        shown = float(value) if wanted is float else value
        words = [mark.words for mark in field.metadata if isinstance(mark, Rule) and mark.bound in ("", bound)]
        return f"{key}={shown} {words[0] if words else _words(bound, context[bound])}"
    if error["type"] == "condition":
        return f"{key}={value} {context['words']}"
    if error["type"] == "literal_error":
        (choice,) = (mark for mark in field.metadata if isinstance(mark, Choice))
        return f"{key}={value} is not known; {_valid(value, choice.values)}"
    if error["loc"][-1] == "[key]":
        return f"{key}={value!r} has a name that is not text"
    return f"{key}={value!r} is not {_TYPE_NAMES.get(wanted) or _TYPE_NAMES[get_origin(wanted)]}"


def _words(bound: str, limit: float) -> str:
    if bound == "ge" and limit == 0:
        return "must not be negative"
    return f"must be {_COMPARISONS[bound]} {limit:g}"


def _valid(value: Any, choices: Sequence[Any]) -> str:
    return nearest(value, choices) if isinstance(value, str) else f"it is {' or '.join(map(str, choices))}"
