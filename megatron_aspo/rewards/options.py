"""Options of rewards."""

from dataclasses import field
from typing import Annotated, Any

from pydantic import Field

from megatron_aspo.common.errors import require
from megatron_aspo.common.options import Choice, NonNegative, Positive, Rule, default_of, first_changed, options, suggested
from megatron_aspo.rewards.choice import BY_SOURCE, NAMES, RewardChoice
from megatron_aspo.rewards.code.options import CodeOptions
from megatron_aspo.rewards.math.options import MathOptions
from megatron_aspo.rewards.service.options import ServiceOptions


@options("data")
class RewardOptions:
    reward: Annotated[str, suggested(*NAMES, BY_SOURCE)] = ""
    """The reward, needed by `task: dataset`: `code` for programs graded by tests, `math` for an answer in `\\boxed{}`, `by_source` for one
    of these two by the name of the row's data source, `remote` for a grading server, or `package.module:function`."""
    rewards: dict[str, Any] = field(default_factory=dict)
    """In place of `data.reward`, the rewards of each data source with their weights: `{gsm8k: {math: 1, format: 0.2}, "*": code}`. `*` is
    every other source. Beside those of `data.reward` there are `format`, `repetition` and `remote`."""
    reward_wrong_score: Annotated[float, Field(lt=1), Rule("must be below 1, that of a right response")] = 0.0
    """Score of a wrong response by `code` and `math`, where a right one has 1: 0 or -1, say."""
    code: CodeOptions = field(default_factory=CodeOptions)
    math: MathOptions = field(default_factory=MathOptions)
    service: ServiceOptions = field(default_factory=ServiceOptions)
    format_tags: list[str] = field(default_factory=lambda: ["think"])
    """Tags that `format` requires, each once and in this order."""
    repetition_ngram: Annotated[Positive[int], Rule("must be 1 or more; raise it")] = 20
    """Words of the sequences that `repetition` counts when they occur again; its score is minus their share."""
    reward_workers: Positive[int] = 1
    """Processes that score responses."""
    reward_resource: str = ""
    """Custom Ray resource of which each reward worker takes 1: workers run only on nodes that were started with it."""
    reward_timeout_s: Positive[float] = 60.0
    """Longest time to score one response, in seconds. A reward that takes longer is killed and the response gets `reward_failure_score`."""
    reward_failure_score: float = 0.0
    """Reward of a response on which the reward timed out, or crashed its process twice, or failed where `reward_on_error` is `score`."""
    reward_on_error: Annotated[str, Choice("stop", "score")] = "stop"
    """The action when a reward raises an exception or returns no finite number: `stop` ends the run and names the prompt; `score` gives
    the response `reward_failure_score`, and names it."""
    reward_memory_gib: Annotated[NonNegative[float], Rule("must not be negative; set 0 for no limit")] = 0.0
    """Upper bound of the memory of a reward's process, in GiB; 0: none. One that exceeds it counts as crashed, and is replaced."""


def check_rewards(data: RewardOptions, server_reward: str = "") -> None:
    """Raise UserError for options of rewards that do not go together or have no effect.

    server_reward: the reward that the server of `data.reward=remote` must use; its options are then rules for the server.
    """
    names = RewardChoice(data).names | {server_reward} - {""}
    for name, section, chosen, limit in (
        ("code", "code", data.code, "total_s"),
        ("math", "math", data.math, "limit_s"),
        ("remote", "service", data.service, "give_up_s"),
    ):
        if name not in names:
            require(
                not (changed := first_changed(chosen)),
                f"data.{section}.{changed} has no effect with data.reward={data.reward or 'empty'}; set data.reward={name}",
            )
            continue
        if not isinstance(chosen, MathOptions):
            chosen.check()
        limit_s = getattr(chosen, limit)
        require(
            data.reward_timeout_s > limit_s,
            f"data.reward_timeout_s={data.reward_timeout_s:g} must be above data.{section}.{limit}={limit_s:g}, after which grading ends "
            "by itself; raise it",
        )
    for key, users in (
        ("format_tags", {"format"}),
        ("repetition_ngram", {"repetition"}),
        ("reward_wrong_score", {"code", "math", "remote"}),
    ):
        value = getattr(data, key)
        require(
            names & users or value == default_of(RewardOptions, key),
            f"data.{key}={value} has no effect without the reward {' or '.join(sorted(users))}; choose it in data.rewards",
        )
