"""A whole run over three hosts: the trainer on one, an engine on each of the others, on a cluster that tools/start_ray.sh built."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.launching import STATE, Listener, environment, listening, nothing_runs, start, stop
from tests.e2e.workplace import RUN_S, make_workplace, metrics, timeless, wait_for
from tests.hosts import ROOT, Hosts

pytestmark = pytest.mark.long
HOSTS = 3
STEPS = 2
"""Enough to generate from weights that were trained and sent over the link."""
PORTS = range(6379, 7379)
"""Ports of the launcher's map."""
CLIENT = "tests/e2e/without_token.py"


@dataclass(frozen=True)
class Seen:
    """A run over three hosts, and the observations made while it trained."""

    directory: Path
    status: int
    error: str
    listeners: list[Listener]
    without_token: dict[tuple[int, int], list[str]]
    """(host, port) → the answer to a client on another host."""
    with_token: dict[tuple[int, int], list[str]]
    link_bytes: int
    """Total bytes that left the trainer's host."""
    nodes: dict[str, set[int]]
    """Role → hosts on which its processes ran."""


@pytest.fixture(scope="module")
def seen(hosts) -> Seen:
    directory = hosts.directory / "train"
    directory.mkdir()
    make_workplace(directory)
    pinned = ["--resources", "trainers=1", "--resources", "engines:1=2-3"]
    started = start(hosts, *pinned, "--num-cpus", "6", "--export", f"PYTHONPATH={ROOT}", "--export", "HF_HUB_OFFLINE=1")
    assert started.returncode == 0, started.stdout + started.stderr
    command = ["-m", "megatron_aspo", "train", "recipe.yaml", "--ray-address", "10.77.0.1:6379", "name=three_hosts", f"steps={STEPS}"]
    token = f"{STATE}/nodes/10.77.0.1/token"
    known = environment(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=token)
    driver = hosts.popen(1, sys.executable, *command, "trainer.resource=trainers", "rollout.resource=engines", env=known, cwd=directory)
    run = directory / "runs" / "three_hosts"
    try:
        wait_for(driver, lambda: (run / "metrics.jsonl").exists() and metrics(run))
        listeners = [listener for host in hosts.numbers for listener in listening(hosts, host)]
        roles = {
            "trainer": {host for host in hosts.numbers if "TrainerActor" in commands(hosts, host)},
            "engine": {host for host in hosts.numbers if "Engine" in commands(hosts, host).replace("EngineCore", "")},
        }
        words = hosts.run(1, "cat", token).stdout
        asked = [ask(hosts, listeners, known) for known in ("", words)]
        _, error = driver.communicate(timeout=RUN_S)
    finally:
        driver.kill()
    counters = next(line for line in hosts.run(1, "cat", "/proc/net/dev").stdout.splitlines() if "eth0:" in line)
    assert stop(hosts).returncode == 0
    return Seen(run, driver.returncode, error, listeners, *asked, int(counters.split()[9]), roles)


def commands(hosts: Hosts, host: int) -> str:
    return hosts.run(host, "ps", "-eo", "args").stdout


def ask(hosts: Hosts, listeners: list[Listener], token: str) -> dict[tuple[int, int], list[str]]:
    """Return the answer of each server that listens on all interfaces to a client on another host."""
    answers = {}
    for host in hosts.numbers:
        ports = [str(listener.port) for listener in listeners if listener.host == host and listener.open_to_all]
        done = hosts.run(host % HOSTS + 1, sys.executable, CLIENT, hosts.addresses[host - 1], *ports, env=environment(TOKEN=token))
        assert done.returncode == 0, done.stderr
        answers |= {(host, int(port)): answer for port, answer in json.loads(done.stdout).items()}
    return answers


def test_a_run_over_three_hosts_gives_the_metrics_of_the_run_on_one(seen, whole):
    assert seen.status == 0, seen.error
    assert seen.nodes == {"trainer": {1}, "engine": {2, 3}}

    ours, theirs = timeless(seen.directory), timeless(whole)[:STEPS]
    assert len(ours) == len(theirs) == STEPS
    # A run does not measure the memory of a cluster's machines. On one machine each engine gets the bytes from the ranks; here they cross
    # the link once, and one engine forwards them to the other.
    names = {name for name in ours[0].keys() | theirs[0].keys() if not name.startswith("memory/")} - {"weights/bytes_sent"}
    differ = [(step, name, a.get(name), b.get(name)) for step, (a, b) in enumerate(zip(ours, theirs)) for name in names]
    assert len(names) >= 40 and not [found for found in differ if found[2] != found[3]]
    assert seen.link_bytes >= sum(step["weights/bytes_sent"] for step in ours) > 0


def test_none_of_our_ports_is_open_to_all(seen):
    """Only Ray's ports are open to all: its map has them."""
    assert not [listener for listener in seen.listeners if listener.open_to_all and listener.port not in PORTS]
    private = [listener for listener in seen.listeners if not listener.open_to_all]
    assert not [listener for listener in private if not listener.address.startswith(("127.", "10.77.0.", "[::1"))]
    # The sockets of Gloo and of the stores, of ranks and engines, are among them.
    theirs = [listener for listener in private if listener.port > 32767 and listener.address.startswith("10.77.0.")]
    assert {listener.host for listener in theirs} == {*range(1, HOSTS + 1)}


def test_each_of_rays_servers_refuses_a_client_without_the_token(seen):
    asked = {(listener.host, listener.port) for listener in seen.listeners if listener.open_to_all}
    assert asked and seen.without_token.keys() == asked
    wrong = {where: answers for where, answers in seen.without_token.items() if answers not in (["UNAUTHENTICATED"], ["401"])}
    assert not wrong
    assert not {where for where, answers in seen.with_token.items() if {"UNAUTHENTICATED", "401"} & set(answers)}


def test_nothing_is_left_on_the_hosts(hosts, seen):
    assert nothing_runs(hosts, *hosts.numbers)
