"""From a prompt's words to token ids."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_aspo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": …}"""


def encode_chat(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> tuple[int, ...]:
    """Token ids of `messages` in the model's chat template, with the generation prompt: an answer can follow at once.

    Raises UserError if the tokenizer has no chat template or its template refuses the messages.
    """
    from jinja2 import TemplateError

    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {name} has no chat template, which prompts in chat form need; "
            "use a chat model, or give the prompts of a JSONL file as plain strings"
        )
    try:
        token_ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the chat template of {name} refuses messages with roles {roles} ({error}); change the messages") from error
    return tuple(token_ids)


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[int, ...]:
    """Token ids of `text` as it stands, after the special tokens (such as a beginning-of-sequence token) that the tokenizer puts first."""
    return tuple(tokenizer(text)["input_ids"])
