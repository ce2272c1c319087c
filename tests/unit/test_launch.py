"""The parts of the launcher that need no host: hostfiles, environments, ports, resources, the token, and what the agent ends."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_aspo.common.auth_token import find_token
from megatron_aspo.common.errors import UserError
from megatron_aspo.launch import agent
from megatron_aspo.launch.hosts import Host, find_hosts, read_hostfile
from megatron_aspo.launch.options import Record
from megatron_aspo.launch.ports import SPAN, PortMap
from megatron_aspo.launch.remote import HostError, Reach, is_this_machine
from megatron_aspo.launch.start import main, parse_resources

NOWHERE = Path("/nonexistent/hostfile")


def hostfile(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hostfile"
    path.write_text(text)
    return path


def test_a_hostfile_is_read_as_mpi_reads_it(tmp_path):
    path = hostfile(tmp_path, "# comment\n\nnode1 slots=8 max_slots=16\nuser@node2:4\nnode3   # idle\nnode1 slots=2\n")
    assert read_hostfile(path) == [Host("node1", 10), Host("user@node2", 4), Host("node3", 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("node1 slots=two\n", "hostfile:1: slots=two is not a whole number"),
        ("node1\nnode2 8\n", "hostfile:2: '8' is not understood"),
        ("-oProxyCommand=touch\n", "hostfile:1: '-oProxyCommand=touch' is no host name"),
        ("node1;reboot\n", "is no host name"),
    ],
)
def test_an_invalid_line_of_a_hostfile_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_hostfile(hostfile(tmp_path, text))


def test_each_environment_is_recognised_and_named(tmp_path, monkeypatch):
    path = hostfile(tmp_path, "node1\nnode2\n")
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")

    slurm = find_hosts("", {"SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "3"}, NOWHERE)
    assert [host.name for host in slurm.hosts] == ["gpu07", "gpu08"] and "Slurm job 3" in slurm.source and slurm.rank is None
    mpi = find_hosts("", {"OMPI_MCA_orte_default_hostfile": str(path)}, NOWHERE)
    assert mpi.count == 2 and "MPI" in mpi.source
    assert find_hosts("", {}, path).source == f"MPI, {path}"
    pod = find_hosts("", {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "job-0"}, NOWHERE)
    assert (pod.rank, pod.count, pod.hosts) == (2, 3, (Host("job-0"), Host(os.uname().nodename)))
    assert find_hosts(str(path), {"SLURM_JOB_NODELIST": "other"}, NOWHERE).source == f"hostfile {path}"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "no hosts are given: name a hostfile"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "expected 0 <= NODE_RANK < NNODES"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR is not set"),
    ],
)
def test_an_environment_without_hosts_is_refused(environ, message):
    with pytest.raises(UserError, match=message):
        find_hosts("", environ, NOWHERE)


def test_the_ports_of_two_clusters_that_are_a_span_apart_differ_and_lie_below_the_ephemeral_range():
    def ports(base: int) -> list[int]:
        found = PortMap(base)
        first, last = found.workers
        return [*found.of(head=True).values(), *range(first, last + 1)]

    mine, next_one = ports(6379), ports(6379 + SPAN)
    assert len(set(mine)) == len(mine) and not set(mine) & set(next_one)
    assert max(mine) < 32768
    assert set(PortMap(6379).of(head=False).values()) < set(mine)
    printed = "\n".join(PortMap(6379).lines(dashboard=False, metrics=False))
    assert all(str(port) in printed for port in PortMap(6379).of(head=True).values()) and "6399-7378" in printed
    for wrong in (80, 65000):
        with pytest.raises(UserError, match=f"--port {wrong}"):
            PortMap(wrong)


def test_resources_are_assigned_to_the_named_hosts():
    hosts = [Host("a", 8), Host("b"), Host("c")]
    assert parse_resources(["trainers:4=1-2", "engines=c", "graders=a,3"], hosts) == {
        "a": {"trainers": 4, "graders": None},
        "b": {"trainers": 4},
        "c": {"engines": None, "graders": None},
    }
    for words, message in {
        "trainers": "is not understood",
        "trainers=d": "d is none of the hosts a, b, c",
        "trainers=2-4": "there are no hosts 2-4",
        "GPU=1": "Ray's own",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_resources([words], hosts)


def test_a_token_is_created_once_and_readable_only_by_this_user(tmp_path):
    token, path = find_token("", str(tmp_path / "state"), {})
    assert len(token) == 64 and path.stat().st_mode & 0o777 == 0o600
    assert find_token("", str(tmp_path / "state"), {})[0] == token
    assert [file.name for file in path.parent.iterdir()] == ["token"]
    path.chmod(0o644)
    with pytest.raises(UserError, match=r"can be read by every user .*chmod 600"):
        find_token("", str(tmp_path / "state"), {})
    with pytest.raises(UserError, match="cannot be read"):
        find_token("", str(tmp_path / "state"), {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "missing")})


def test_an_invalid_call_ends_with_status_2_and_one_line(tmp_path, capsys):
    path = str(hostfile(tmp_path, "localhost\n"))
    for options, message in {
        ("--port", "80"): "--port 80",
        ("--num-cpus", "-1"): "--num-cpus -1 is too small",
        ("--timeout", "0"): "--timeout 0 is not above 0",
        ("--export", "NOT_SET_ANYWHERE"): "--export NOT_SET_ANYWHERE: the variable is not set here",
        ("--ssh-options", "'"): "cannot be split into words",
    }.items():
        assert main([path, "--dir", str(tmp_path / "state"), *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_cluster_is_recorded_with_the_access_to_its_hosts(tmp_path):
    record = Record((Host("a", 8), Host("u@b")), Reach(str(tmp_path), "/opt/python", "conda activate x", ("-p", "2222")))
    assert Record.read(str(tmp_path)) is None
    record.write()
    assert Record.read(str(tmp_path)) == record
    Record.path(str(tmp_path)).write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        Record.read(str(tmp_path))


def test_this_machine_needs_no_ssh_but_another_login_on_it_does():
    assert is_this_machine("localhost") and is_this_machine("127.0.0.1") and is_this_machine(os.uname().nodename)
    assert not is_this_machine("root@localhost") and not is_this_machine("192.0.2.1")


def request(tmp_path: Path, **more) -> dict:
    return {"directory": str(tmp_path), "host": "a", "token": "t" * 64, **more}


def keep_node(tmp_path: Path, leader: list[int], processes: list[list[int]] = ()) -> None:
    os.makedirs(tmp_path / "nodes/a", exist_ok=True)
    node = {"leader": leader, "processes": list(processes), "boot": agent._boot_id(), "name": "f" * 32}
    (tmp_path / "nodes/a/node.json").write_text(json.dumps(node))


def test_the_agent_ends_its_processes_and_their_descendants_but_not_a_reused_process_id(tmp_path):
    sleep = [sys.executable, "-c", "import subprocess, sys; subprocess.Popen(['sleep', '60']); print(1, flush=True); sys.stdin.read()"]
    ours, other = (subprocess.Popen(sleep, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2))
    marked = subprocess.Popen(["sleep", "60"], env=os.environ | {agent.MARK: "f" * 32})
    for process in (ours, other):
        process.stdout.readline()
    try:
        begun = agent._identity(other.pid)[1]
        keep_node(tmp_path, agent._identity(ours.pid), [[other.pid, begun - 1]])  # as if `other` reused a recorded process's id
        started = time.monotonic()
        assert agent.stop(request(tmp_path)) == {"ended": 3}
        assert time.monotonic() - started < 5
        assert ours.poll() is not None and marked.poll() is not None and other.poll() is None
        assert agent.stop(request(tmp_path)) == {"ended": 0}
    finally:
        for pid in [*agent._descendants([other.pid]), other.pid]:
            os.kill(pid, 9)
        other.wait()


def test_a_record_from_before_a_restart_of_the_host_is_ignored(tmp_path):
    keep_node(tmp_path, agent._identity(os.getpid()))
    assert agent._live_node(request(tmp_path)) is not None
    path = tmp_path / "nodes/a/node.json"
    path.write_text(path.read_text().replace(agent._boot_id(), "another boot"))
    assert agent._live_node(request(tmp_path)) is None and agent.stop(request(tmp_path)) == {"ended": 0}


RAY = """
import pathlib, sys, time
calls = pathlib.Path("calls")
calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
if len(calls.read_text()) <= {failures}:
    sys.exit("Exception: The current node timed out during startup. This could happen because ...")
print("Ray runtime started.", flush=True)
time.sleep(600)
"""
"""`ray.scripts.scripts` that is too slow the first times."""


@pytest.mark.parametrize(("failures", "starts"), [(0, 1), (1, 2), (2, 2)])
def test_a_node_that_ray_gave_no_time_to_register_is_started_once_more(tmp_path, monkeypatch, failures, starts):
    scripts = tmp_path / "stub" / "ray" / "scripts"
    scripts.mkdir(parents=True)
    for folder in (scripts, scripts.parent):
        (folder / "__init__.py").touch()
    (scripts / "scripts.py").write_text(RAY.format(failures=failures))
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)  # the paths of Ray's sockets must be short
    words = {"token": "", "temp_dir": "tmp", "environment": {"PYTHONPATH": str(tmp_path / "stub")}, "arguments": []}
    asked = request(tmp_path, **words, cluster="c", role="worker", gcs="10.0.0.1:6379", port=6380, timeout_s=60)
    try:
        if failures < 2:
            agent.start(asked)
        else:
            with pytest.raises(agent.Refused, match="timed out during startup"):
                agent.start(asked)
        assert len((tmp_path / "nodes/a/calls").read_text()) == starts
    finally:
        agent.stop(asked)


def test_the_agents_answer_is_found_in_the_output_of_login_scripts(tmp_path):
    reach = Reach(str(tmp_path), sys.executable, "echo welcome; echo '{}'")
    assert reach.call("stop", Host("localhost"), {}, 30) == {"ended": 0}


def test_a_failed_call_carries_the_hosts_last_lines(tmp_path):
    for activate, message in {"echo no such environment >&2; false": "status 1:\nno such environment", "": "No such file"}.items():
        with pytest.raises(HostError, match=message):
            Reach(str(tmp_path), "/nonexistent/python", activate).call("stop", Host("localhost"), {}, 30)
    slow = Reach(str(tmp_path), sys.executable, "sleep 60")
    with pytest.raises(HostError, match=r"localhost: no answer to stop within 0\.5 s"):
        slow.call("stop", Host("localhost"), {}, 0.5)


def test_the_agent_runs_on_a_host_with_only_python(tmp_path, monkeypatch, capsys):
    """It is sent as text, and imports only the standard library."""
    whole = json.dumps(request(tmp_path, verb="stop"))
    done = subprocess.run(
        [sys.executable, "-I", "-S", agent.__file__], input=whole, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == agent.ANSWER + '{"ended": 0}'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(request(tmp_path, verb="status")).encode())))
    monkeypatch.setattr(agent.signal, "signal", lambda *_: None)
    agent.main()
    assert '"alive": false' in capsys.readouterr().out
