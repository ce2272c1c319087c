"""Options of prompts."""

from dataclasses import field
from typing import Any

from megatron_aspo.common.options import Positive, options


@options("data")
class PromptOptions:
    chat_template: str = ""
    """Path of a Jinja chat template that takes the place of the tokenizer's, in the exported model too."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, such as `{enable_thinking: false}`."""
    system_prompt: str = ""
    """System message of chat prompts that have none of their own."""
    max_prompt_tokens: Positive[int] = 2048
    """Longest prompt, chat template included. A longer one is an error at the start of the run, unless `data.drop_long_prompts` is set."""
