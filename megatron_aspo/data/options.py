"""Options of the data room."""

from dataclasses import dataclass, field
from typing import Any

from megatron_aspo.rewards.code.options import CodeOptions


@dataclass(frozen=True)
class DataOptions:
    path: str = ""
    """JSONL file of training prompts; needed by `task: jsonl`, refused by the procedural tasks."""
    eval_path: str = ""
    """JSONL file of held-out prompts; needed by `task: jsonl` when `evaluation.draws` is above 0."""
    reward: str = ""
    """The reward, needed by `task: jsonl`: `package.module:function`, or `code` for programs graded by tests."""
    code: CodeOptions = field(default_factory=CodeOptions)
    reward_workers: int = 1
    """Processes that score responses."""
    reward_resource: str = ""
    """Custom Ray resource of which each reward worker takes 1: workers run only on nodes that were started with it."""
    reward_timeout_s: float = 60.0
    """Longest time to score one response, in seconds. A reward that takes longer is killed and the response gets `reward_failure_score`."""
    reward_failure_score: float = 0.0
    """Reward of a response on which the reward timed out, or crashed its process twice."""
    chat_template: str = ""
    """Path of a Jinja chat template that takes the place of the tokenizer's, in the exported model too."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, such as `{enable_thinking: false}`."""
    system_prompt: str = ""
    """System message of chat prompts that have none of their own."""
    max_prompt_tokens: int = 2048
    """A longer prompt (chat template included) is an error at the start of the run."""
    held_out_prompts: int = 20
    """How many prompts a procedural task keeps out of training, at least."""
