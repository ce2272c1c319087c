"""Options of the reward that calls a grading server."""

from typing import Annotated

from megatron_aspo.common.errors import require
from megatron_aspo.common.options import Choice, Positive, options


@options("data.service")
class ServiceOptions:
    """Options of `data.reward: remote`."""

    url: str = ""
    """Address of the server, such as `http://10.0.0.5:8300`."""
    protocol: Annotated[str, Choice("grade", "sandbox_fusion")] = "grade"
    """`grade`: a `megatron-aspo grade-server`, which scores the response by its own recipe. `sandbox_fusion`: SandboxFusion's `/run_code`,
    which runs the program of the response on the input of each test; the outputs are compared here."""
    token_file: str = ""
    """File with the server's token; empty sends none."""
    attempt_s: Positive[float] = 30.0
    """Longest time for one request, in seconds."""
    give_up_s: Positive[float] = 50.0
    """A server that is unreachable, overloaded or silent is retried, with pauses that grow to 5 s, for this many seconds; then the run
    ends."""

    def check(self) -> None:
        """Raise UserError unless `url` begins with http:// or https://."""
        require(
            self.url.startswith(("http://", "https://")),
            f"data.service.url={self.url or 'empty'} is no address; set it to the server's, such as http://10.0.0.5:8300",
        )
