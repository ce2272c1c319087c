"""Prompts from a JSONL file of the user's own: one JSON object on each line, UTF-8.

    {"prompt": "Tell me a joke.", "answer": "42"}
    {"prompt": [{"role": "user", "content": "What is 6 x 7?"}], "ground_truth": 42, "id": "six-seven", "level": 1}

- `prompt`: a list of messages (role `system`, `user` or `assistant`; the last one the user's), put into the model's chat template; or a
  string, given to the model as it stands, without the template.
- `ground_truth`, or else `answer`: any JSON value, handed to the reward.
- `id` (optional): a string or integer, once in a file. Without it the line number is the id.
- `data_source` (optional): a string, `jsonl` if absent; it goes into the rollout dumps, and to the reward in `extra` too.
- All other fields go to the reward as `extra`.

Blank lines are skipped.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_aspo.data.encoder import PromptEncoder
from megatron_aspo.data.options import DataOptions
from megatron_aspo.data.order import shuffled_position
from megatron_aspo.data.records import Prompt
from megatron_aspo.errors import UserError
from megatron_aspo.rewards.code.reward import CodeReward
from megatron_aspo.rewards.code.schemas import check_ground_truth
from megatron_aspo.rewards.result import Reward
from megatron_aspo.rewards.user import load_reward

ROLES = ("system", "user", "assistant")
_OTHER_FORMATS = {
    b"\x1f\x8b": "a gzip file; unpack it (gunzip)",
    b"\x28\xb5\x2f\xfd": "a Zstandard file; unpack it (unzstd)",
    b"BZh": "a bzip2 file; unpack it (bunzip2)",
    b"\xfd7zXZ": "an xz file; unpack it (unxz)",
    b"PK\x03\x04": "a zip file; unpack it",
    b"PAR1": "a Parquet file; write its rows as JSONL",
    b"ARROW1": "an Arrow file; write its rows as JSONL",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}
"""First bytes of files that are taken for JSONL by their name."""


class JsonlTask:
    """Epochs over the shuffled rows of `data.path`, held-out prompts in the order of `data.eval_path`, and the reward `data.reward`."""

    name = "jsonl"

    def __init__(self, options: DataOptions, encoder: PromptEncoder, seed: int):
        if not options.path:
            raise UserError("task=jsonl needs data.path, the JSONL file of training prompts; set it")
        _require_reward(options)
        self._seed = seed
        check = check_ground_truth if options.reward == "code" else None
        tokens = options.max_prompt_tokens
        self._training = read_prompts(Path(options.path), "train", encoder, tokens, check)
        self._held_out = read_prompts(Path(options.eval_path), "eval", encoder, tokens, check) if options.eval_path else None
        encoder.check_options_used()

    @classmethod
    def build_reward(cls, options: DataOptions) -> Reward:
        """Raises UserError if `data.reward` is missing or cannot be loaded."""
        _require_reward(options)
        return CodeReward(options.code) if options.reward == "code" else load_reward(options.reward)

    def prompt(self, index: int) -> Prompt:
        return self._training[shuffled_position(self._seed, index, len(self._training))]

    def held_out(self) -> list[Prompt]:
        """Raises UserError if no file of held-out prompts was named."""
        if self._held_out is None:
            raise UserError("task=jsonl needs data.eval_path, a JSONL file of held-out prompts, to evaluate; set it, or evaluation.draws=0")
        return list(self._held_out)


def _require_reward(options: DataOptions) -> None:
    if not options.reward:
        raise UserError("task=jsonl needs data.reward, the function that scores a response, as package.module:function; set it")


def read_prompts(
    path: Path, split: str, encoder: PromptEncoder, max_prompt_tokens: int, check: Callable[[Any, str], None] | None = None
) -> list[Prompt]:
    """Return all prompts of the file, with ids `SPLIT/ID`. Raises UserError naming file and line for the first thing that is wrong.

    check: called with ground truth and text of each row; raises UserError for a ground truth that the reward cannot use.
    """
    prompts: list[Prompt] = []
    line_of_id: dict[str, int] = {}
    for number, row in read_rows(path, "prompt and ground_truth"):
        where = f"{path}:{number}"
        prompt = _make_prompt(row, where, f"{split}/{row.get('id', number)}", number, encoder)
        if prompt.id in line_of_id:
            raise UserError(f"{where}: id {row.get('id', number)!r} is also that of line {line_of_id[prompt.id]}; ids must differ")
        if not 1 <= len(prompt.token_ids) <= max_prompt_tokens:
            raise UserError(
                f"{where}: the prompt has {len(prompt.token_ids)} tokens, expected 1 to data.max_prompt_tokens={max_prompt_tokens}; "
                "shorten it, or raise that"
            )
        if check:
            try:
                check(prompt.ground_truth, prompt.text)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
        line_of_id[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} holds no prompts; expected one JSON object on each line")
    return prompts


def read_rows(path: Path, fields: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row) for each line that is not blank. Raises UserError naming file and line for the first that is wrong.

    fields: what messages say that a row must have.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a JSONL file") from error
    for start, kind in _OTHER_FORMATS.items():
        if content.startswith(start):
            raise UserError(f"{path} is not JSONL but {kind}")
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error}); expected one JSON object on each line{_hint(line)}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: a JSON {_json_type(row)}, expected an object with {fields}{_hint(line)}")
        _check_surrogates(row, line, f"{path}:{number}")
        yield number, row


def _make_prompt(row: dict[str, Any], where: str, prompt_id: str, number: int, encoder: PromptEncoder) -> Prompt:
    truth_field = "ground_truth" if "ground_truth" in row else "answer"
    for field in ("prompt", truth_field):
        if field not in row:
            wanted = "ground_truth (or answer)" if field == truth_field else field
            raise UserError(f"{where}: the field {wanted} is missing; add it")
    if row.get("answer") is not None and row[truth_field] is None:
        raise UserError(f"{where}: ground_truth is null beside answer={row['answer']!r}; remove one of the two")
    if type(row.get("id", "")) not in (str, int):
        raise UserError(f"{where}: id is a JSON {_json_type(row['id'])}, expected a string or an integer")
    data_source = row.get("data_source", JsonlTask.name)
    if not isinstance(data_source, str):
        raise UserError(f"{where}: data_source is a JSON {_json_type(data_source)}, expected a string")
    content = row["prompt"]
    if isinstance(content, str):
        text = content
        _check_text(text, "prompt", where)
    elif isinstance(content, list):
        _check_messages(content, where)
        text = content[-1]["content"]
    else:
        raise UserError(f"{where}: prompt is a JSON {_json_type(content)}, expected a string or a list of messages")
    try:
        token_ids = encoder.text(text) if content is text else encoder.chat(content)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    extra = {key: value for key, value in row.items() if key not in ("prompt", truth_field, "id")}
    return Prompt(prompt_id, token_ids, text, ground_truth=row[truth_field], data_source=data_source, extra=extra, place=number)


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
        raise UserError(f"{where}: {name} is a JSON {_json_type(text)}, expected a string that is not empty")


def _check_surrogates(row: dict[str, Any], line: bytes, where: str) -> None:
    """Refuse halves of surrogate pairs in any field: UTF-8 files such as the rollout dumps cannot hold them."""
    if b"\\u" not in line:
        return
    for name, value in row.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: {name!a} holds half of a surrogate pair (\\ud800 to \\udfff); write the whole character") from error


def _json_type(value: Any) -> str:
    if value == "":
        return "empty string"
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return kinds[type(value)]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in values if keys.count(key) > 1)!a} occurs twice in one object")
    return values


def _hint(line: bytes) -> str:
    return "; a file that is one JSON array has to be written as a line for each of its elements" if line.lstrip()[:1] == b"[" else ""
