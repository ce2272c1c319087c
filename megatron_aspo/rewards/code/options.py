"""Options of the code reward."""

from dataclasses import field
from typing import Annotated

from megatron_aspo.common.errors import require
from megatron_aspo.common.options import Choice, NonNegative, Positive, Rule, options
from megatron_aspo.rewards.code.extract import BLOCKS
from megatron_aspo.rewards.sandbox.options import Limits, SandboxOptions


@options("data.code")
class CodeOptions:
    """Options of `data.reward: code`."""

    sandbox: SandboxOptions = field(default_factory=SandboxOptions)
    limits: Limits = field(default_factory=Limits)
    """Limits of each single test."""
    total_s: Positive[float] = 45.0
    """Wall-clock time for all tests of one response together, in seconds. Must be below `data.reward_timeout_s`."""
    max_tests: Annotated[NonNegative[int], Rule("must be 0, for all tests, or more; raise it")] = 0
    """Run at most this many tests of a problem, spread evenly over their order, always the same ones; 0: all."""
    max_program_kb: Positive[int] = 256
    """A longer program, in KiB, fails without being run."""
    lcb_reference: str = ""
    """Directory of a LiveCodeBench checkout whose own grader gives the verdicts, for comparison with published numbers. Not for training:
    it rejects many correct programs, and lets cheats pass."""
    block: Annotated[str, Choice(*BLOCKS)] = "last"
    """The block of a response that is its program. `last`: the last complete Python block after the last `</think>`. `archer`: the last
    ```python block after the first `</think>`. `livecodebench`: the text between the last two lines with ```."""

    def check(self) -> None:
        """Raise UserError for options that do not go together."""
        wall_s, cpu_s = self.limits.wall_s, self.limits.cpu_s
        require(wall_s >= cpu_s, f"data.code.limits.wall_s={wall_s:g} is below cpu_s={cpu_s:g}; raise it")
