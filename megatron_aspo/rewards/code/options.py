"""Options of the code reward."""

from dataclasses import dataclass, field

from megatron_aspo.common.errors import UserError, nearest
from megatron_aspo.rewards.code.extract import BLOCKS
from megatron_aspo.rewards.sandbox.options import Limits, SandboxOptions


@dataclass(frozen=True)
class CodeOptions:
    """Options of `data.reward: code`."""

    sandbox: SandboxOptions = field(default_factory=SandboxOptions)
    limits: Limits = field(default_factory=Limits)
    """Limits of each single test."""
    total_s: float = 45.0
    """Wall-clock time for all tests of one response together, in seconds. Must be below `data.reward_timeout_s`."""
    max_tests: int = 0
    """Run at most this many tests of a problem, spread evenly over their order, always the same ones; 0: all."""
    max_program_kb: int = 256
    """A longer program, in KiB, fails without being run."""
    lcb_reference: str = ""
    """Directory of a LiveCodeBench checkout whose own grader gives the verdicts, for comparison with published numbers. Not for training:
    it rejects many correct programs, and lets cheats pass."""
    block: str = "last"
    """The block of a response that is its program. `last`: the last complete Python block after the last `</think>`. `archer`: the last
    ```python block after the first `</think>`. `livecodebench`: the text between the last two lines with ```."""

    def check(self, prefix: str = "code.") -> None:
        """Raise UserError naming the first option that is out of bounds."""
        if self.block not in BLOCKS:
            raise UserError(f"{prefix}block={self.block} is not known; {nearest(self.block, BLOCKS)}")
        values = {f"limits.{name}": value for name, value in vars(self.limits).items()}
        values |= {"total_s": self.total_s, "max_program_kb": self.max_program_kb, "sandbox.pool": self.sandbox.pool}
        for name, value in values.items():
            if value <= 0:
                raise UserError(f"{prefix}{name}={value} must be above 0; raise it")
        if self.max_tests < 0:
            raise UserError(f"{prefix}max_tests={self.max_tests} must be 0, for all tests, or more; raise it")
        if self.limits.wall_s < self.limits.cpu_s:
            raise UserError(f"{prefix}limits.wall_s={self.limits.wall_s:g} is below cpu_s={self.limits.cpu_s:g}; raise it")
