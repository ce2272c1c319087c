"""tools/start_ray.sh and tools/stop_ray.sh on hosts made of namespaces."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.launching import START_S, STATE, environment, launcher, names, nothing_runs, start, stop
from tests.hosts import ROOT, Hosts

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("clean_hosts")]


def servers(hosts: Hosts, host: int) -> dict[int, str]:
    """Return Ray's long-lived processes on a host; its agents come and go."""
    return {pid: name for pid, name in names(hosts, host).items() if name in ("gcs_server", "raylet")}


def test_a_cluster_is_started_found_running_repaired_and_stopped(hosts):
    first = start(hosts)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "the cluster runs: 2 nodes" in first.stdout and "--ray-address 10.77.0.1:6379" in first.stdout
    assert "gcs_server" in names(hosts, 1).values() and "gcs_server" not in names(hosts, 2).values()
    assert all("raylet" in names(hosts, host).values() for host in (1, 2))
    before = servers(hosts, 1), servers(hosts, 2)

    again = start(hosts)
    assert again.returncode == 0 and "already running: 2 nodes, nothing was started" in again.stdout
    assert (servers(hosts, 1), servers(hosts, 2)) == before

    assert_state_is_private(hosts)
    assert_token_is_kept(hosts, [first.stdout, first.stderr, again.stdout])
    other = hosts.directory / "other_token"
    other.write_text("0123456789abcdef0123456789abcdef")
    other.chmod(0o600)
    wrong = start(hosts, "--token-file", str(other))
    assert wrong.returncode == 2 and "the cluster on 10.77.0.1 runs with another token; name its file by --token-file" in wrong.stderr

    hosts.kill(2)
    down = start(hosts)
    assert down.returncode == 1 and "error: 10.77.0.2: ssh cannot reach it" in down.stderr and "nothing was started" in down.stderr
    assert servers(hosts, 1) == before[0]

    hosts.boot(2)
    mended = start(hosts)
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert "1 of 2 nodes run already; starting 10.77.0.2" in mended.stdout and "the cluster runs: 2 nodes" in mended.stdout
    assert "raylet" in names(hosts, 2).values()

    hosts.kill(2)
    half = stop(hosts)
    assert half.returncode == 1 and "not known to be stopped: 10.77.0.2" in half.stderr
    assert nothing_runs(hosts, 1)
    hosts.boot(2)
    for _ in range(2):
        done = stop(hosts, str(hosts.hostfile))
        assert done.returncode == 0 and "10.77.0.1: nothing of ours was running" in done.stdout, done.stderr


def assert_state_is_private(hosts: Hosts) -> None:
    node = json.loads(hosts.run(1, "cat", f"{STATE}/nodes/10.77.0.1/node.json").stdout)
    assert set(node) == {"cluster", "gcs", "role", "port", "name", "boot", "leader", "processes"}
    assert hosts.run(1, "stat", "-c", "%a", STATE, f"{STATE}/nodes/10.77.0.1").stdout.split() == ["700", "700"]


def assert_token_is_kept(hosts: Hosts, printed: list[str]) -> None:
    """Assert that the token is in files of mode 600, and in no other file, argument, environment or line of output."""
    token = hosts.run(1, "cat", f"{STATE}/token").stdout
    assert len(token) == 64
    for host in (1, 2):
        look = hosts.run(host, "grep", "-rlF", token, "/tmp", "/dev/shm", "/root/.ray", "/root/.ssh").stdout.split()
        assert set(look) <= {f"{STATE}/token", f"{STATE}/nodes/10.77.0.{host}/token"} and look
        for path in look:
            mode = hosts.run(host, "stat", "-c", "%a %u", path).stdout
            assert mode == "600 0\n", path
        for pid in hosts.processes(host):
            for file in ("cmdline", "environ"):
                assert token.encode() not in Path(f"/proc/{pid}/{file}").read_bytes()
    assert not [text for text in printed if token in text]
    assert token.encode() not in b"".join(path.read_bytes() for path in hosts.directory.rglob("*") if path.is_file())


def test_a_key_that_the_hosts_do_not_know_is_reported(hosts):
    words = launcher(hosts, "start_ray.sh", str(hosts.hostfile))
    words[-1] = words[-1].replace(f"{hosts.directory}/key ", f"{hosts.directory}/other_key ")
    done = hosts.run(1, *words, env=environment())
    assert done.returncode == 1
    assert "error: 10.77.0.2: ssh cannot reach it" in done.stderr and "Permission denied (publickey" in done.stderr
    assert nothing_runs(hosts, 1, 2)


def test_a_host_that_is_down_is_named_before_anything_starts(hosts):
    listed = hosts.directory / "one_too_many"
    listed.write_text(hosts.hostfile.read_text() + "10.77.0.9\n")
    done = start(hosts, hostfile=listed)
    assert done.returncode == 1
    assert "error: 10.77.0.9: ssh cannot reach it" in done.stderr and "1 of 3 hosts failed; nothing was started" in done.stderr
    assert nothing_runs(hosts, 1, 2)


def test_a_port_in_use_is_named_before_anything_starts(hosts):
    listen = "import socket, time; s = socket.create_server(('10.77.0.2', 6380)); print('up', flush=True); time.sleep(600)"
    holder = hosts.popen(2, sys.executable, "-c", listen)
    try:
        holder.stdout.readline()
        done = start(hosts)
    finally:
        for pid in hosts.processes(2):
            os.kill(pid, 9)
        holder.wait()
    assert done.returncode == 1
    assert "10.77.0.2: port 6380 (node-manager) is in use. Nothing was started." in done.stderr and "--port 7379" in done.stderr
    assert nothing_runs(hosts, 1, 2)


def test_a_host_that_dies_while_the_cluster_starts_is_named_and_the_rest_is_stopped(hosts):
    words = launcher(hosts, "start_ray.sh", str(hosts.hostfile), "--timeout", str(START_S))
    process = hosts.popen(1, *words, env=environment())
    for line in process.stdout:
        if "starting 10.77.0.2" in line:
            break
    hosts.kill(2)
    _, error = process.communicate(timeout=START_S)
    assert process.returncode == 1
    assert "error: 10.77.0.2: ssh cannot reach it, or the connection broke during start" in error
    assert "what this call started is ended again" in error
    assert nothing_runs(hosts, 1)


def test_an_interrupted_start_leaves_no_process(hosts):
    words = launcher(hosts, "start_ray.sh", str(hosts.hostfile), "--object-store-mb", "100")
    process = hosts.popen(1, *words, env=environment())
    while "gcs_server" not in (found := names(hosts, 1)).values():
        assert process.poll() is None
        time.sleep(0.05)
    (pid,) = (pid for pid in found if b"megatron_aspo.launch.start" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
    os.kill(pid, signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "interrupted; what this call had started is ended" in error
    assert nothing_runs(hosts, 1, 2)


def test_a_node_with_another_token_does_not_join_and_its_host_is_named(hosts):
    """Each node makes its own call here, as the pods of a Kubernetes job do."""
    calls = {}
    for rank, host in enumerate((1, 2)):
        token = hosts.directory / f"token{host}"
        token.write_text(f"{host}" * 32)
        token.chmod(0o600)
        pod = {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "10.77.0.1", "RAY_AUTH_TOKEN_PATH": str(token)}
        words = ["bash", "tools/start_ray.sh", "--dir", STATE, "--num-cpus", "1", "--object-store-mb", "100", "--timeout", "25"]
        calls[host] = hosts.popen(host, *words, env=environment(**pod))
    printed = {host: call.communicate(timeout=START_S) for host, call in calls.items()}
    assert [call.returncode for call in calls.values()] == [1, 1], printed
    assert "error: host2: the head refuses this host's token" in printed[2][1] and "uthentication" in printed[2][1]
    assert "1 of 2 nodes joined within 25 s" in printed[1][1]
    assert nothing_runs(hosts, 1, 2)


def test_two_users_of_one_host_do_not_interfere(hosts):
    """`nobody` and `games`, which every Debian has."""
    users = {"nobody": (65534, 6379), "games": (5, 7379)}
    hostfile = hosts.directory / "one_host"
    hostfile.write_text("10.77.0.1\n")

    def call(tool: str, name: str, *options: str) -> subprocess.CompletedProcess:
        home = f"/tmp/{name}"
        hosts.run(1, "sh", "-c", f"mkdir -p {home} && chown {users[name][0]} {home}")
        words = ["bash", str(ROOT / "tools" / tool), str(hostfile), *options]
        return hosts.run(1, *words, user=users[name][0], env=environment(HOME=home), timeout_s=START_S)

    small = ("--num-cpus", "1", "--object-store-mb", "100")
    theirs = call("start_ray.sh", "nobody", *small)
    assert theirs.returncode == 0, theirs.stdout + theirs.stderr
    clash = call("start_ray.sh", "games", *small)
    assert clash.returncode == 1 and "10.77.0.1: port 6379 (gcs) is in use" in clash.stderr and "--port 7379" in clash.stderr
    ours = call("start_ray.sh", "games", *small, "--port", "7379")
    assert ours.returncode == 0, ours.stdout + ours.stderr
    before = {pid for pid in servers(hosts, 1) if os.stat(f"/proc/{pid}").st_uid == 65534}
    assert call("stop_ray.sh", "games").returncode == 0
    assert set(servers(hosts, 1)) == before and len(before) == 2
    assert {os.stat(f"/proc/{pid}").st_uid for pid in hosts.processes(1)} == {65534}
    assert "already running: 1 nodes" in call("start_ray.sh", "nobody", *small).stdout
    assert call("stop_ray.sh", "nobody").returncode == 0
    assert nothing_runs(hosts, 1)


def test_a_blocking_call_stops_its_node_on_a_signal_and_exits_when_the_node_does(hosts):
    """As a container's process does; on one host, whose network interface is given."""
    hostfile = hosts.directory / "one_host"
    hostfile.write_text("host1\n")
    small = ("--num-cpus", "1", "--object-store-mb", "100")
    unknown = start(hosts, "--interface", "eth7", hostfile=hostfile)
    assert unknown.returncode == 1 and "eth7" in unknown.stderr and "nothing was started" in unknown.stderr
    for end in ("signal", "node"):
        words = launcher(hosts, "start_ray.sh", str(hostfile), *small, "--interface", "eth0", "--block")
        process = hosts.popen(1, *words, env=environment())
        while "the cluster runs: 1 nodes" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        assert process.stdout.readline() and process.poll() is None
        found = names(hosts, 1)
        if end == "signal":
            (pid,) = (pid for pid in found if b"megatron_aspo.launch.start" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
            os.kill(pid, signal.SIGTERM)
        else:
            os.kill(next(pid for pid, name in found.items() if name == "raylet"), signal.SIGKILL)
        _, error = process.communicate(timeout=60)
        assert process.returncode == (128 + signal.SIGTERM if end == "signal" else 1), error
        assert end == "signal" or "host1: the node ended" in error
        assert nothing_runs(hosts, 1) or end == "node"
    assert stop(hosts, str(hostfile)).returncode == 0
    assert nothing_runs(hosts, 1)


@pytest.mark.skipif(importlib.util.find_spec("aiohttp_cors") is not None, reason="Ray's optional packages are installed")
def test_a_dashboard_without_its_packages_is_refused_before_anything_starts(hosts):
    refused = start(hosts, "--dashboard", "--metrics")
    assert refused.returncode == 1 and "error: 10.77.0.1: --dashboard and --metrics need packages of Ray" in refused.stderr
    assert "pip install 'ray[default]==" in refused.stderr and nothing_runs(hosts, 1, 2)
