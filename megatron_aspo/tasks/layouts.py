"""The layouts of rows, recognised by field names.

| layout | a row has | prompt | ground truth |
|---|---|---|---|
| ours | `prompt`, `ground_truth` or `answer` | messages, or text that the model gets unchanged | any JSON value |
| verl, Archer | `prompt`, `data_source`, `reward_model.ground_truth`, `extra_info` | messages, or text as above | any JSON value |
| Archer2.0, as published | `prompt`, `ground_truth` and `ability`, all text | a user's message, or JSON text of messages | text |

Messages are a list of {role, content} with the role `system`, `user` or `assistant`; the last one is the user's. All go through the model's
chat template.
"""

import json
from dataclasses import dataclass
from typing import Any

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.encoder import Message
from megatron_aspo.data.json_rows import json_type
from megatron_aspo.data.sources import Row

ROLES = ("system", "user", "assistant")
WANTED = "prompt and ground_truth"
"""Required fields, as errors name them."""
_RAW_FIELDS = ("question", "problem", "Problem", "question_content")
"""Fields with the question in data sets without prompts."""


@dataclass(frozen=True)
class Problem:
    """A row in normalised form."""

    messages: list[Message] | None
    """None if the prompt is text that the model gets unchanged."""
    text: str
    """The user's last message, or that text."""
    ground_truth: Any
    data_source: str
    extra: dict[str, Any]
    """The other fields, for the reward."""
    id: str | int | None
    """The row's `id`."""
    known_as: str
    """The problem's identifier across files: `id`, or verl's `extra_info.index` if that is text; empty if there is none."""


def understand(row: Row, default_source: str) -> Problem:
    """Return a row in normalised form. Raises UserError naming row and field. default_source: data source of rows that name none."""
    where, fields = row.where, row.fields
    if "prompt" not in fields:
        raw = next((name for name in _RAW_FIELDS if name in fields), "")
        cure = f"add it; tools/prepare_data.py makes prompts of rows that have {raw}" if raw else "add it"
        raise UserError(f"{where}: the field prompt is missing; {cure}")
    if "reward_model" in fields:
        layout, truth, used = "verl", _verl_truth(fields["reward_model"], where), ("prompt", "reward_model", "id")
    else:
        name = "ground_truth" if "ground_truth" in fields else "answer"
        if name not in fields:
            raise UserError(f"{where}: the field ground_truth (or answer, or reward_model.ground_truth) is missing; add it")
        if fields[name] is None and fields.get("answer") is not None:
            raise UserError(f"{where}: ground_truth is null beside answer={fields['answer']!r}; remove one of the two")
        published = all(isinstance(fields.get(key), str) for key in ("prompt", "ground_truth", "ability"))
        layout, truth, used = "archer2" if published else "ours", fields[name], ("prompt", name, "id")
    if type(fields.get("id", "")) not in (str, int):
        raise UserError(f"{where}: id is a JSON {json_type(fields['id'])}, expected a string or an integer")
    source = fields.get("data_source", fields["ability"] if layout == "archer2" else default_source)
    if not isinstance(source, str):
        raise UserError(f"{where}: data_source is a JSON {json_type(source)}, expected a string")
    messages, text = _read_prompt(fields["prompt"], layout, where)
    extra = {key: value for key, value in fields.items() if key not in used}
    return Problem(messages, text, truth, source, extra, fields.get("id"), _known_as(fields))


def _verl_truth(reward_model: Any, where: str) -> Any:
    if not isinstance(reward_model, dict):
        raise UserError(f"{where}: reward_model is a JSON {json_type(reward_model)}, expected an object with ground_truth")
    if reward_model.get("ground_truth") is None:
        raise UserError(f"{where}: the field reward_model.ground_truth is missing; add it")
    return reward_model["ground_truth"]


def _known_as(fields: dict[str, Any]) -> str:
    if "id" in fields:
        return str(fields["id"])
    extra_info = fields.get("extra_info")
    index = extra_info.get("index") if isinstance(extra_info, dict) else None
    return index if isinstance(index, str) else ""  # a number only counts the rows of its own file


def _read_prompt(prompt: Any, layout: str, where: str) -> tuple[list[Message] | None, str]:
    if isinstance(prompt, list):
        _check_messages(prompt, where)
        return prompt, prompt[-1]["content"]
    if not isinstance(prompt, str):
        raise UserError(f"{where}: prompt is a JSON {json_type(prompt)}, expected a string or a list of messages")
    _check_text(prompt, "prompt", where)
    if layout != "archer2":
        return None, prompt
    messages = _parse_messages(prompt)
    if messages is None:
        return [{"role": "user", "content": prompt}], prompt
    _check_messages(messages, where)
    return messages, messages[-1]["content"]


def _parse_messages(text: str) -> list[Any] | None:
    """Return the messages that the text encodes as JSON; None if it is a question in words."""
    if not text.lstrip().startswith("["):
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, list) and all(isinstance(value, dict) and "role" in value for value in values) else None


def _check_messages(messages: list[Any], where: str) -> None:
    if not messages:
        raise UserError(f"{where}: prompt is an empty list, expected at least one message")
    for position, message in enumerate(messages):
        name = f"prompt[{position}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise UserError(f"{where}: {name} is not a message, expected an object with role and content")
        if message["role"] not in ROLES:
            raise UserError(f"{where}: {name} has role {message['role']!r}, expected one of {', '.join(ROLES)}")
        _check_text(message["content"], f"{name}.content", where)
    if messages[-1]["role"] != "user":
        raise UserError(f"{where}: the last message is the {messages[-1]['role']}'s, expected the user's, which the model is to answer")


def _check_text(text: Any, name: str, where: str) -> None:
    if not isinstance(text, str) or not text:
        raise UserError(f"{where}: {name} is a JSON {json_type(text)}, expected a string that is not empty")
