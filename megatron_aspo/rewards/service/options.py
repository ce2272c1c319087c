"""Options of the reward that calls a grading server."""

from dataclasses import dataclass

from megatron_aspo.common.errors import UserError, nearest

PROTOCOLS = ("grade", "sandbox_fusion")


@dataclass(frozen=True)
class ServiceOptions:
    """Options of `data.reward: remote`."""

    url: str = ""
    """Address of the server, such as `http://10.0.0.5:8300`."""
    protocol: str = "grade"
    """`grade`: a `megatron-aspo grade-server`, which scores the response by its own recipe. `sandbox_fusion`: SandboxFusion's `/run_code`,
    which runs the program of the response on the input of each test; the outputs are compared here."""
    token_file: str = ""
    """File with the server's token; empty sends none."""
    attempt_s: float = 30.0
    """Longest time for one request, in seconds."""
    give_up_s: float = 50.0
    """A server that is unreachable, overloaded or silent is retried, with pauses that grow to 5 s, for this many seconds; then the run
    ends."""

    def check(self, prefix: str = "service.") -> None:
        """Raise UserError naming the first option that is out of bounds."""
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"{prefix}url={self.url or 'empty'} is no address; set it to the server's, such as http://10.0.0.5:8300")
        if self.protocol not in PROTOCOLS:
            raise UserError(f"{prefix}protocol={self.protocol} is not known; {nearest(self.protocol, PROTOCOLS)}")
        for name in ("attempt_s", "give_up_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"{prefix}{name}={getattr(self, name):g} must be above 0; raise it")
