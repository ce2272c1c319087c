"""Check of the sandbox in which `data.reward: code` runs programs."""

from dataclasses import replace

from megatron_aspo.common.errors import UserError
from megatron_aspo.doctor.needs import RunNeeds
from megatron_aspo.doctor.record import Record, ok, refused
from megatron_aspo.rewards.code.options import CodeOptions
from megatron_aspo.rewards.sandbox.pool import SandboxPool

_CURE = "try bwrap --unshare-all --ro-bind / / true, and read docs/code_reward.md; only runs with data.reward=code need it"


def check_sandbox(needs: RunNeeds) -> Record:
    """Start a sandbox as the reward does, and run a program in it to its end."""
    code = needs.code or CodeOptions()
    try:
        SandboxPool(replace(code.sandbox, pool=1), code.limits).close()
    except UserError as error:
        return refused("sandbox", error, "failed" if needs.code else "warning", _CURE)
    kind = "bubblewrap starts and ends a program" if code.sandbox.kind == "bubblewrap" else "none: programs run as this user"
    return ok("sandbox", kind)
