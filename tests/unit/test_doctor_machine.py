"""`megatron-aspo doctor`, the checks of one machine: each real fault is named, with its cure."""

import os
import resource
import socket
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.doctor.files import check_data, check_model
from megatron_aspo.doctor.limits import cgroup_processes, check_open_files
from megatron_aspo.doctor.needs import RunNeeds
from megatron_aspo.doctor.ports import HEAD_PORT, check_ports, find_listeners
from megatron_aspo.doctor.record import Record, ok
from megatron_aspo.doctor.runner import run_checks
from megatron_aspo.doctor.sandbox import check_sandbox
from megatron_aspo.doctor.storage import check_hub_cache, check_run_directory
from megatron_aspo.rewards.code.options import CodeOptions
from tests.unit.doctor_process import in_process

NOBODY = 65534
NO_PORTS: dict[int, str] = {}


def limit(kind: int, soft: int, hard: int):
    return lambda: resource.setrlimit(kind, (soft, hard))


@pytest.mark.parametrize(("hard", "status"), [(512, "failed"), (2048, "warning"), (20000, "ok")])
def test_few_open_files_are_named_with_the_command_that_raises_them(hard, status):
    record = in_process("limits.check_open_files(False)", prepare=limit(resource.RLIMIT_NOFILE, min(hard, 512), hard))
    assert record.status == status and str(hard) in record.detail
    assert ("ulimit -n" in record.cure) == (status != "ok")


def test_the_cluster_check_accounts_for_ray_start_not_raising_the_soft_limit():
    record = in_process("limits.check_open_files(True)", prepare=limit(resource.RLIMIT_NOFILE, 900, 20000))
    assert record.status == "failed" and record.detail.startswith("900 for each process")


def test_a_low_limit_of_locked_memory_matters_only_with_infiniband_cards(tmp_path):
    cards = tmp_path / "infiniband"
    (cards / "mlx5_0").mkdir(parents=True)
    before = f"limits._INFINIBAND = Path({str(cards)!r})"
    record = in_process("limits.check_locked_memory()", before, prepare=limit(resource.RLIMIT_MEMLOCK, 65536, 65536))
    assert record.status == "warning" and "64 KiB" in record.detail and "mlx5_0" in record.detail and "ulimit -l unlimited" in record.cure


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to be, who has no other processes")
def test_a_low_limit_of_processes_is_reported():
    """The limit does not apply to root, but to an ordinary user."""
    record = in_process("limits.check_processes()", f"import os; os.setuid({NOBODY})", prepare=limit(resource.RLIMIT_NPROC, 100, 100))
    assert record.status == "failed" and "may have 100 processes" in record.detail and "ulimit -u" in record.cure
    assert in_process("limits.check_processes()", prepare=limit(resource.RLIMIT_NPROC, 100, 100)).status == "ok"


def test_the_tightest_limit_of_a_control_group_and_its_parents_counts(tmp_path):
    group = tmp_path / "fs" / "pod" / "container"
    group.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/pod/container\n")
    for directory, most, used in ((group, "max", 30), (group.parent, "100", 40)):
        (directory / "pids.max").write_text(f"{most}\n")
        (directory / "pids.current").write_text(f"{used}\n")
    assert cgroup_processes(tmp_path / "cgroup", tmp_path / "fs") == (40, 100)
    (group.parent / "pids.max").write_text("max\n")
    assert cgroup_processes(tmp_path / "cgroup", tmp_path / "fs") is None


def test_the_open_files_limit_of_this_process_is_read_rather_than_assumed():
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert str(soft) in check_open_files(True).detail


def private_mounts() -> bool:
    """Return whether a process here may have a private mount namespace, in which nothing is mounted for others."""
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not private_mounts(), reason="no private mount namespaces here")
@pytest.mark.parametrize(
    ("size", "status"), [("2m", "failed"), ("3g", "warning")], ids=["almost nothing", "less than a run's logs may take"]
)
def test_a_small_disk_under_the_temporary_directory_is_named(size, status):
    """Uses a real file system of that size, in a mount namespace that only the process has."""
    inside = ("unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs /mnt && exec "$@"', "sh")
    record = in_process("storage.check_temporary_directory()", "", inside, TMPDIR="/mnt", RAY_TMPDIR="/mnt")
    assert record.status == status and "free in /mnt" in record.detail and "set RAY_TMPDIR and TMPDIR" in record.cure


@pytest.mark.skipif(not private_mounts(), reason="no private mount namespaces here")
def test_shared_memory_of_dockers_size_is_too_small():
    inside = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh")
    record = in_process("storage.check_shared(needs.RunNeeds(Path('/tmp')))", "", inside)
    assert (record.status, record.detail) == ("failed", "64 MiB of 64 MiB free in /dev/shm")
    assert "--shm-size" in record.cure


def test_a_run_directory_that_cannot_be_written_or_is_too_small_for_the_run_is_named(tmp_path):
    assert check_run_directory(RunNeeds(tmp_path / "runs" / "one")).status in ("ok", "warning")
    assert not (tmp_path / "runs").exists()
    record = check_run_directory(RunNeeds(Path("/proc/runs/one")))
    assert record.status == "failed" and "/proc/runs/one cannot be written" in record.detail and "run_dir" in record.cure
    record = check_run_directory(RunNeeds(tmp_path, disk_bytes=1 << 60))
    assert record.status == "failed" and "the run will write about" in record.detail and "keep fewer checkpoints" in record.cure


def test_a_hub_cache_that_cannot_be_written_fails_only_a_run_that_fetches_from_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/proc/cache/hub")
    assert check_hub_cache(RunNeeds(tmp_path, model=str(tmp_path))).status == "warning"
    record = check_hub_cache(RunNeeds(tmp_path, model="owner/model"))
    assert record.status == "failed" and "HF_HOME" in record.cure


def test_without_bubblewrap_only_a_run_with_the_code_reward_fails(tmp_path):
    for code, status in (("None", "warning"), ("CodeOptions()", "failed")):
        before = "from megatron_aspo.rewards.code.options import CodeOptions"
        record = in_process(f"sandbox.check_sandbox(needs.RunNeeds(Path('/tmp'), code={code}))", before, PATH=str(tmp_path))
        assert record.status == status and "no bwrap on PATH" in record.detail and "install bubblewrap" in record.cure


def test_the_sandbox_is_tried_with_the_recipes_options(tmp_path):
    from megatron_aspo.rewards.sandbox.options import SandboxOptions

    record = check_sandbox(RunNeeds(tmp_path, code=CodeOptions(SandboxOptions(kind="none"))))
    assert record.status == "failed" and "accept_risk" in record.cure


def test_a_port_taken_by_another_program_is_named_with_the_program():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        name = psutil.Process().name()
        assert name in find_listeners()[port]
        record = check_ports(NO_PORTS, (port,))
    assert record.status == "warning" and f"port {port} of a Ray head is taken by" in record.detail and name in record.detail
    assert f"--port={port + 1}" in record.cure


def test_ray_servers_on_ephemeral_ports_are_named(tmp_path):
    ephemeral = tmp_path / "range"
    ephemeral.write_text("32768\t60999\n")
    record = check_ports({45678: "node manager", HEAD_PORT: "head"}, ephemeral=ephemeral)
    assert record.status == "warning" and "node manager on 45678" in record.detail and "head" not in record.detail.partition(":")[2]
    assert "--node-manager-port" in record.cure
    assert check_ports({HEAD_PORT: "head"}, ephemeral=ephemeral).status == "ok"
    ephemeral.write_text("10000\t60999\n")
    record = check_ports(NO_PORTS, ephemeral=ephemeral)
    assert record.status == "warning" and "overlaps the ports 10002–19999" in record.detail and "ip_local_port_range" in record.cure


@pytest.fixture
def model(tmp_path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"0" * 100)
    return directory


def test_a_model_is_compared_by_its_files(model):
    before = check_model(str(model))
    assert before.status == "ok" and before.facts == check_model(str(model)).facts
    (model / "model.safetensors").write_bytes(b"1" * 100)
    assert check_model(str(model)).facts != before.facts


@pytest.mark.parametrize("lacks", ["config.json", "model.safetensors", "all"])
def test_an_incomplete_model_is_named(model, lacks):
    for path in list(model.iterdir()):
        if lacks in (path.name, "all"):
            path.unlink()
    if lacks == "all":
        model.rmdir()
    record = check_model(str(model))
    assert record.status == "failed" and str(model) in record.detail and record.cure


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to be")
def test_an_unreadable_model_is_named_with_its_file(model):
    (model / "model.safetensors").chmod(0o600)
    for directory in model.parents:
        if directory.owner() == "root" and directory.name.startswith(("pytest-", "popen-", "test_")):
            directory.chmod(0o755)
    record = in_process(f"files.check_model({str(model)!r})", f"import os; os.setuid({NOBODY})")
    assert record.status == "failed" and f"{model / 'model.safetensors'} cannot be read: Permission denied" in record.detail
    assert "readable for the user of Ray" in record.cure


def test_missing_data_is_a_failure_where_the_run_starts_and_a_warning_elsewhere(tmp_path):
    there = tmp_path / "train.jsonl"
    there.write_text("{}\n")
    assert check_data((str(there), "hub:owner/set"), True).status == "ok"
    missing = (str(there), str(tmp_path / "held_out.jsonl"))
    assert check_data(missing, True).status == "failed" and check_data(missing, False).status == "warning"
    assert "held_out.jsonl cannot be read: No such file or directory" in check_data(missing, True).detail
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dangling.parquet").symlink_to(tmp_path / "nowhere")
    assert "dangling.parquet" in check_data((f"{tmp_path / 'set'}@train",), True).detail


def test_a_hanging_check_is_named_within_its_limit_and_the_others_are_kept(tmp_path):
    """Opening a pipe without a writer waits forever, like an unresponsive file system."""
    pipe = tmp_path / "train.jsonl"
    os.mkfifo(pipe)
    started = time.monotonic()
    checks = {"data": lambda: check_data((str(pipe),), True), "other": lambda: ok("other", "fine")}
    records = {record.check: record for record in run_checks(checks, "here", 0.5)}
    assert time.monotonic() - started < 5
    assert records["other"].status == "ok" and records["data"].status == "failed"
    assert "no answer within 0.5 s" in records["data"].detail and "file system" in records["data"].cure and records["data"].node == "here"
    threading.Thread(target=lambda: pipe.open("wb").close(), daemon=True).start()  # lets the hanging thread go on


def test_a_check_that_raises_is_a_failure_and_the_others_go_on():
    def refuses() -> Record:
        raise UserError("the thing is wrong; turn it round")

    (refused,) = run_checks({"one": refuses}, "here", 5)
    (broken,) = run_checks({"two": lambda: 1 / 0}, "here", 5)
    assert (refused.status, refused.detail, refused.cure) == ("failed", "the thing is wrong", "turn it round")
    assert broken.status == "failed" and "ZeroDivisionError" in broken.detail and "report this" in broken.cure
