"""Encoding of a prompt's messages or text as token ids that the model knows."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.import_path import one_line
from megatron_aspo.data.options import PromptOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": …}"""
RESERVED = ("messages", "add_generation_prompt", "tools", "documents")
"""Template variables that the encoder sets itself."""


class Encoder(Protocol):
    """Gives tasks the token ids of their prompts: `PromptEncoder`, or one that wraps it."""

    def chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Encode the messages of a chat."""
        ...

    def text(self, text: str) -> tuple[int, ...]:
        """Encode a text that no chat template is applied to."""
        ...

    def check_options_used(self) -> None:
        """Raise UserError for an option of chat prompts that has changed none of the prompts encoded so far."""
        ...


class PromptEncoder:
    """Encodes prompts with a model's tokenizer and the options of `data`.

    vocab: rows of the model's embedding. A tokenizer whose tokens were added without resizing the model has ids beyond them: one rank fails
    on these, and several tensor-parallel ranks train on zeros. Such ids are refused.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", vocab: int, options: PromptOptions):
        """Raises UserError for an end-of-sequence token that the model cannot produce, and for unusable template options."""
        self._tokenizer, self._vocab, self._options = tokenizer, vocab, options
        self._chats = self._system_prompts = self._texts = self._kept_prefixes = 0
        if tokenizer.eos_token_id is not None:
            self._check_ids((cast(int, tokenizer.eos_token_id),))
        if reserved := [name for name in RESERVED if name in options.chat_template_kwargs]:
            raise UserError(f"data.chat_template_kwargs.{reserved[0]} is set for each prompt by itself; remove it")

    def chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Encode `messages` by the chat template, generation prompt included, so that the response follows directly.

        `data.system_prompt` comes first where the messages have no system message of their own.
        Raises UserError if there is no chat template, if it refuses the messages or fails, and for token ids that the model lacks.
        """
        if self._options.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._options.system_prompt}, *messages]
            self._system_prompts += 1
        self._chats += 1
        template = self.chat_template
        try:
            ids = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **self._options.chat_template_kwargs,
            )
        except Exception as error:  # a template can raise anything
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"{self._template_name} fails on messages with roles {roles} ({_reason(error)}); change either") from error
        return self._check_ids(cast(list[int], ids))

    def text(self, text: str) -> tuple[int, ...]:
        """Encode `text` unchanged, after the tokenizer's leading special tokens, such as a beginning-of-sequence token.

        A text that already begins with them, because a chat template was applied to it, does not get them twice. Nothing is appended,
        whatever the tokenizer's settings: a response cannot follow an end-of-sequence token.
        Raises UserError for token ids that the model lacks.
        """
        ids = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        self._texts += 1
        if self._prefix and ids[: len(self._prefix)] == self._prefix:
            self._kept_prefixes += 1
        else:
            ids = self._prefix + ids
        return self._check_ids(ids)

    @cached_property
    def chat_template(self) -> str:
        """The template's Jinja source. Raises UserError if there is none, or if a `chat_template_kwargs` name does not occur in it."""
        path = self._options.chat_template
        template = read_chat_template(path) if path else self._tokenizer.chat_template
        if isinstance(template, dict):
            if "default" not in template:
                raise UserError(
                    f"the tokenizer of {self._tokenizer.name_or_path} has chat templates named {', '.join(template)}, and none named "
                    "default; set data.chat_template to the file of the one to use"
                )
            template = template["default"]
        if not template:
            raise UserError(
                f"the tokenizer of {self._tokenizer.name_or_path} has no chat template, which prompts in chat form need; use a chat model, "
                "set data.chat_template, or give the prompts of a JSONL file as plain strings"
            )
        for name in self._options.chat_template_kwargs:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise UserError(f"data.chat_template_kwargs.{name}: {self._template_name} does not read it; remove or correct it")
        return template

    @property
    def given_template(self) -> str:
        """The chat template that `data.chat_template` names, as read at the start; empty if it names none."""
        return self.chat_template if self._options.chat_template else ""

    def check_options_used(self) -> None:
        """Raise UserError for an option of chat prompts that has changed none of the prompts encoded so far."""
        options = self._options
        given = [name for name in ("chat_template", "chat_template_kwargs", "system_prompt") if getattr(options, name)]
        if given and not self._chats:
            raise UserError(f"data.{given[0]} has no effect: all prompts are plain strings, which no template is applied to; remove it")
        if options.system_prompt and not self._system_prompts:
            raise UserError("data.system_prompt has no effect: each prompt has a system message of its own; remove one of them")

    @property
    def remark(self) -> str:
        """One line on which tokens were put before plain-text prompts; empty if there were none."""
        if not self._texts:
            return ""
        first = "".join(self._tokenizer.convert_ids_to_tokens(list(self._prefix)))
        line = f"plain-text prompts: {first or 'no token'} is put first"
        if self._kept_prefixes:
            line += f", except before {self._kept_prefixes} of {self._texts} that begin with it already"
        config = Path(self._tokenizer.name_or_path) / "tokenizer_config.json"
        stated = json.loads(config.read_text(encoding="utf-8")).get("add_bos_token") if config.is_file() else None
        if stated is not None and stated != bool(first):
            line += f"; so says tokenizer.json, which wins over add_bos_token={str(stated).lower()} in tokenizer_config.json"
        return line

    @cached_property
    def _prefix(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer puts before a text."""
        bare = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self._tokenizer("a")["input_ids"]
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return tuple(whole[:start])
        raise UserError(
            f"the tokenizer of {self._tokenizer.name_or_path} encodes 'a' as {bare}, and as {whole} with special tokens: it is not clear "
            "what comes before a text; correct post_processor in its tokenizer.json"
        )

    @property
    def _template_name(self) -> str:
        return f"the chat template {self._options.chat_template or 'of ' + self._tokenizer.name_or_path}"

    def _check_ids(self, ids: Sequence[int]) -> tuple[int, ...]:
        for number in ids:
            if number >= self._vocab:
                raise UserError(
                    f"token {self._tokenizer.convert_ids_to_tokens(number)!r} has id {number}, but the model has {self._vocab} rows "
                    "(ids below that): it was never resized for this token; resize the model's embeddings, or use its own tokenizer"
                )
        return tuple(ids)


def read_chat_template(path: str) -> str:
    """Return the Jinja source in the file at `path`. Raises UserError if it cannot be read."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template={path} cannot be read ({one_line(error)}); name a file with a Jinja template") from error


def _reason(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    return (f"line {line}: " if line else "") + one_line(error)
