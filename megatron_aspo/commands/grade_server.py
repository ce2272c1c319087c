"""`megatron-aspo grade-server`: serves a reward over HTTP, for CPU machines outside the cluster. It needs neither torch nor a GPU."""

import argparse
import ipaddress
from pathlib import Path

from megatron_aspo.common.auth_token import find_token
from megatron_aspo.common.errors import UserError
from megatron_aspo.config import load_optional
from megatron_aspo.rewards.process import reward_name
from megatron_aspo.rewards.service.rules import grading_rules
from megatron_aspo.rewards.service.server import GradingServer
from megatron_aspo.rewards.service.workers import Workers
from megatron_aspo.tasks.options import DataOptions

ALL = "all"
"""Value of --host that means every interface."""


def run_grade_server(parsed: argparse.Namespace) -> None:
    """Serve until interrupted. Raises UserError for an address, a token or a reward that cannot be used."""
    host = interface_of(parsed.host)
    task, options = _choose(parsed)
    if options.reward == "remote":
        raise UserError("data.reward=remote asks a server, and this is one; name the reward that grades")
    token, file = find_token(parsed.token_file, str(Path.home() / ".megatron_aspo" / "grade"), {})
    with Workers(task, options, parsed.workers) as workers:
        try:
            name, rules = reward_name(task, options), grading_rules(options)
            server = GradingServer((host, parsed.port), token, workers, parsed.max_body_mib << 20, name, rules)
        except OSError as error:
            raise UserError(f"{parsed.host}:{parsed.port} cannot be listened on ({error.strerror or error}); name another") from error
        with server:
            address = f"{server.server_address[0]}:{server.server_address[1]}"
            print(f"grading {reward_name(task, options)} with {parsed.workers} processes on http://{address}; token in {file}", flush=True)
            server.serve_forever(poll_interval=0.2)


def _choose(parsed: argparse.Namespace) -> tuple[str, DataOptions]:
    """Return task and options of the reward that was named by itself, by a recipe or by an evaluation's protocol. Raises UserError."""
    named = {"--reward": parsed.reward, "--recipe": parsed.recipe, "--protocol": parsed.protocol}
    given = [f"{option} {value}" for option, value in named.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} both name a reward; give one of the two")
    if parsed.protocol:
        from megatron_aspo.evaluation.plan import make_plan

        return "dataset", make_plan(parsed.protocol, None, (), parsed.overrides).settings.data
    config = load_optional(parsed.recipe, parsed.overrides)
    return (config.task, config.data) if config else ("dataset", DataOptions(reward=parsed.reward or "by_source"))


def interface_of(host: str) -> str:
    """Return the numeric IPv4 address to listen on. Raises UserError for one that means every interface, unless `host` is ALL."""
    if host == ALL:
        return "0.0.0.0"
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as error:
        raise UserError(f"--host {host} is no address; give the one of the private interface, such as 10.0.0.5") from error
    if address.is_unspecified:
        raise UserError(f"--host {host} would listen on every interface; give one address, or --host {ALL} if that is meant")
    if address.version != 4:
        raise UserError(f"--host {host} is not an IPv4 address; give that of the private interface, such as 10.0.0.5")
    return str(address)
