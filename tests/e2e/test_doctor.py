"""`megatron-aspo doctor --ray-address` on a real Ray cluster of two nodes on this machine."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.e2e.workplace import RUN_S
from tests.models import save_tiny

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster

options = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": 100 << 20}
cluster = Cluster(initialize_head=True, head_node_args=options)
second = cluster.add_node(num_cpus=4, object_store_memory=100 << 20)
cluster.wait_for_nodes()
gcs = cluster.head_node.all_processes["gcs_server"][0].process.pid
raylet = second.all_processes["raylet"][0].process.pid
print(json.dumps({"address": cluster.address, "second": raylet, "node": second.node_id, "gcs": gcs}), flush=True)
sys.stdin.readline()
cluster.shutdown()
"""
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}


@contextlib.contextmanager
def cluster() -> Iterator[dict]:
    """Two nodes: address of the head, pid of its GCS; id of the second node and pid of its raylet. No process is left afterwards."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_DISABLE_IMPORT_WARNING": "1"} | TOKEN
    environment.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)
    # Short, because socket paths are limited; and separate from other clusters of this user.
    temporary = tempfile.mkdtemp(prefix="d", dir="/tmp")
    environment["RAY_TMPDIR"] = temporary
    process = subprocess.Popen([sys.executable, "-c", CLUSTER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    family: list[psutil.Process] = []
    try:
        found = next(json.loads(line) for line in process.stdout if line.startswith("{"))
        family = psutil.Process(process.pid).children(recursive=True)
        yield found
    finally:
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            process.communicate("\n", timeout=60)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.kill()
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict]:
    with cluster() as found:
        yield found


def doctor(cwd: Path, *arguments: str, **environment: str) -> tuple[int, list[dict], str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | TOKEN | environment
    command = [sys.executable, "-m", "megatron_aspo", "doctor", "--json", *arguments]
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)["checks"], done.stdout


def records_of(records: list[dict], check: str) -> list[dict]:
    return [record for record in records if record["check"] == check]


@pytest.fixture
def recipe(tmp_path) -> Path:
    save_tiny("qwen2", tmp_path / "model", tied=True)
    values = {
        "model": "model",
        "task": "single_digit_addition",
        "data": {"max_prompt_tokens": 32},
        "trainer": {"dtype": "float32"},
        "rollout": {"dtype": "float32", "kv_cache_gib": 0.01, "max_response_tokens": 16},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def test_both_nodes_and_the_connection_between_them_are_checked(nodes, tmp_path, recipe):
    status, records, text = doctor(
        tmp_path, "--ray-address", nodes["address"], "--recipe", "recipe.yaml", "--bandwidth", "0.2", "--timeout", "60"
    )
    assert status == 0, text
    by_node = {name: len([record for record in records if record["node"] == name]) for name in {record["node"] for record in records}}
    for check in ("versions", "torch", "shared memory", "open files", "sandbox", "model", "clock", "shared directory"):
        assert len(records_of(records, check)) == 2, (check, by_node)
    assert not any(record["status"] == "failed" for record in records)
    (link,) = records_of(records, "gloo")
    assert link["status"] == "ok" and " – " in link["node"] and "GB/s there" in link["detail"] and "GB/s back" in link["detail"]
    assert {record["status"] for record in records_of(records, "same on all nodes")} == {"ok"}
    (placement,) = records_of(records, "placement")
    assert "2 of 8 logical CPUs on 2 nodes" in placement["detail"]
    assert [record["detail"] for record in records_of(records, "Ray token")] == ["required by this node's servers"] * 2
    assert TOKEN["RAY_AUTH_TOKEN"] not in text


def test_a_wrong_token_is_a_failure_and_is_not_printed(nodes, tmp_path):
    wrong = "f" * 32
    status, records, text = doctor(tmp_path, "--ray-address", nodes["address"], RAY_AUTH_TOKEN=wrong)
    (joined,) = records_of(records, "Ray cluster")
    assert status == 1 and joined["status"] == "failed" and "token" in joined["cure"], text
    assert wrong not in text and TOKEN["RAY_AUTH_TOKEN"] not in text


def test_a_frozen_actor_is_named_within_its_limit(ray_cluster):
    """One of two processes is stopped before it is called."""
    import ray

    from megatron_aspo.doctor.calls import gather
    from megatron_aspo.doctor.cluster import start_on
    from megatron_aspo.doctor.links import try_links
    from megatron_aspo.doctor.probe import LinkEnd

    node = ray.get_runtime_context().get_node_id()
    ends = {name: start_on(node, LinkEnd, {}) for name in ("node a", "node b", "node c")}
    pids, failures = gather({name: end.ready.remote() for name, end in ends.items()}, 120)
    assert not failures
    os.kill(pids["node b"], signal.SIGSTOP)
    try:
        plan = [[("node a", "node b")], [("node b", "node c")], [("node a", "node c")]]
        phases: list[str] = []
        started = time.monotonic()
        records = [*try_links(ends, plan, 0.1, "gloo", lambda name, limit_s: phases.append(name), transfer_s=1)]
        assert time.monotonic() - started < 40
        assert [(record.node, record.status) for record in records] == [("node a – node b", "failed"), ("node a – node c", "ok")]
        assert records[0].detail.startswith("node b: no answer within") and "node b is frozen" in records[0].cure
        assert len(phases) == 3
    finally:
        os.kill(pids["node b"], signal.SIGCONT)
        for end in ends.values():
            ray.kill(end)


def test_a_frozen_node_is_named_while_the_other_is_checked_and_a_frozen_head_fails_in_time(nodes, tmp_path):
    """The last test, because the cluster cannot be used after it."""
    raylet = psutil.Process(nodes["second"])
    for process in (raylet, *raylet.children(recursive=True)):
        process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    status, records, text = doctor(tmp_path, "--ray-address", nodes["address"], "--timeout", "10", "--bandwidth", "0")
    assert time.monotonic() - started < 180
    assert status == 1, text
    (frozen,) = records_of(records, "Ray process")
    assert frozen["status"] == "failed" and nodes["node"][:6] in frozen["node"] and "frozen" in frozen["cure"]
    assert len(records_of(records, "versions")) == 1
    os.kill(nodes["gcs"], signal.SIGSTOP)  # now it accepts connections, but never answers
    status, records, text = doctor(tmp_path, "--ray-address", nodes["address"], "--timeout", "5")
    assert status == 1 and "hung while joining the Ray cluster: no answer within 10 s" in records[-1]["detail"], text
