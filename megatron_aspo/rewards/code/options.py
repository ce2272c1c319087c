"""Options of the code reward."""

from dataclasses import dataclass, field

from megatron_aspo.rewards.sandbox.options import Limits, SandboxOptions


@dataclass(frozen=True)
class CodeOptions:
    sandbox: SandboxOptions = field(default_factory=SandboxOptions)
    limits: Limits = field(default_factory=Limits)
    """Of each test."""
    total_s: float = 60.0
    """Time on the clock for all tests of one response together, in seconds."""
    max_tests: int = 0
    """Run at most this many tests of a problem, spread evenly over their order, always the same; 0: all."""
    max_program_kb: int = 256
    """A longer program, in KiB, fails unrun."""
