"""Rules of grading, by which a server and an evaluation that asks it compare how they grade."""

from dataclasses import asdict, replace
from typing import Any

from megatron_aspo.common.errors import UserError
from megatron_aspo.rewards.options import RewardOptions
from megatron_aspo.rewards.service.client import Server

PATH = "/rules"
"""Path under which a server answers with its rules."""
_ANSWER_S, _GIVE_UP_S = 10.0, 50.0
"""An answer takes no grading, so that an attempt needs little time; the rest is for a server that is being started."""


def grading_rules(data: RewardOptions) -> dict[str, Any]:
    """Return what a verdict depends on, as key path → value: the reward, its options, and time limits.

    The sandbox is left out: which packages a program may import is a matter of the machine that grades.
    """
    code, rules = asdict(data.code), {f"data.{name}": getattr(data, name) for name in ("reward", "reward_wrong_score", "reward_timeout_s")}
    del code["sandbox"]
    limits = {f"limits.{name}": value for name, value in code.pop("limits").items()}
    for section, values in (("code", code | limits), ("math", asdict(data.math))):
        rules |= {f"data.{section}.{name}": value for name, value in values.items()} if data.reward == section else {}
    return rules


def require_rules(data: RewardOptions, wanted: dict[str, Any], cure: str) -> None:
    """Return if the server of `data.service` grades by these rules. cure: how such a server is started.

    Raises UserError naming the first rule that differs, for a server that cannot say, and as `Server` does.
    """
    if data.service.protocol != "grade":
        raise UserError(
            f"data.service.protocol={data.service.protocol}: its server does not say by which limits it grades, and an evaluation's are "
            f"fixed; set data.service.protocol=grade, and start the server with {cure}"
        )
    impatient = replace(data.service, attempt_s=min(data.service.attempt_s, _ANSWER_S), give_up_s=min(data.service.give_up_s, _GIVE_UP_S))
    found = Server(impatient).get(PATH)
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(f"{data.service.url} grades with {key}={found.get(key)}, not {value}; start it with {cure}")
