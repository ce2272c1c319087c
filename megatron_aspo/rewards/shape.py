"""Rewards for the form of a response, to be mixed with one for its content. Each takes time linear in the response's length."""

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards.result import RewardResult


class FormatReward:
    """A `Reward`: 1.0 if each tag encloses text exactly once, in the given order, else 0.0.

    With `[think]`: `<think>`, some text, `</think>`, and more text. The first opening tag may be missing, because some chat templates end
    with it.
    """

    def __init__(self, tags: list[str]):
        """Raises UserError if there are no tags, or one is not an identifier."""
        if not tags or not all(tag.isidentifier() for tag in tags):
            raise UserError(f"data.format_tags={tags} must be names of tags, such as [think, answer]; set it")
        self._tags = tags

    def __call__(self, prompt: Prompt, response: str) -> RewardResult:
        rest = response
        for position, tag in enumerate(self._tags):
            opening, closing = f"<{tag}>", f"</{tag}>"
            if response.count(opening) > 1 or response.count(closing) > 1:
                return RewardResult(0.0, f"{opening} more than once")
            if opening in rest:
                before, _, rest = rest.partition(opening)
                if before.strip() and position == 0:
                    return RewardResult(0.0, f"text before {opening}")
            elif position:
                return RewardResult(0.0, f"no {opening} in its place")
            inside, found, rest = rest.partition(closing)
            if not found or not inside.strip():
                return RewardResult(0.0, f"{closing} is missing" if not found else f"nothing in {opening}")
        if self._tags[-1] == "think" and not rest.strip():
            return RewardResult(0.0, "nothing after </think>")
        return RewardResult(1.0, "right form")


class RepetitionReward:
    """A `Reward` from −1 to 0: minus the share of the response's n-grams of words that occurred before in it (arXiv 2502.03373, B)."""

    def __init__(self, n: int):
        self._n = n

    def __call__(self, prompt: Prompt, response: str) -> RewardResult:
        words = response.lower().split()
        total = len(words) - self._n + 1
        if total < 1:
            return RewardResult(0.0, "too short to repeat itself")
        repeated = total - len({tuple(words[start : start + self._n]) for start in range(total)})
        return RewardResult(-repeated / total, f"{repeated} of {total} sequences of {self._n} words are repeated")
