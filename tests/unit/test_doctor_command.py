"""`megatron-aspo doctor` as called by a user: table, JSON, exit status, and a limit for everything."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_aspo.cli import main
from megatron_aspo.doctor.command import examine
from megatron_aspo.doctor.record import failed, ok, warning
from megatron_aspo.doctor.redact import redactor
from megatron_aspo.doctor.table import CHECKS, format_table, sort_records
from megatron_aspo.doctor.worker import Request
from tests.in_process import run_main
from tests.models import save_tiny

ROOT = Path(__file__).parents[2]


def start(cwd: Path, *arguments: object, **environment: str) -> subprocess.Popen:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, "-m", "megatron_aspo", "doctor", *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def recipe(tmp_path) -> Path:
    save_tiny("qwen2", tmp_path / "model", tied=True)
    text = "model: model\ntask: single_digit_addition\nname: tiny\ndata: {max_prompt_tokens: 32}\ntrainer: {dtype: float32}\n"
    (tmp_path / "recipe.yaml").write_text(text + "rollout: {dtype: float32, kv_cache_gib: 0.01, max_response_tokens: 16}\n")
    return tmp_path / "recipe.yaml"


def test_a_machine_and_its_recipe_are_checked_and_the_json_object_holds_no_secret_and_no_user(tmp_path, recipe):
    home = tmp_path / "home" / "alice"
    home.mkdir(parents=True)
    environment = {"HF_TOKEN": "hf_secret_of_alice", "HOME": str(home), "HF_HOME": str(home / "hf_secret_of_alice")}
    process = start(tmp_path, "--recipe", "recipe.yaml", "--json", "--timeout", "100", **environment)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, out + error
    found = json.loads(out)
    by_check = {record["check"]: record for record in found["checks"]}
    assert found["status"] == "ok" and by_check.keys() <= {*CHECKS}
    here = {"versions", "GPUs", "torch", "run directory", "temporary files", "shared memory", "open files", "locked memory", "processes"}
    assert by_check.keys() >= here | {"hub cache", "ports", "Ray token", "sandbox", "model", "placement"}
    assert by_check["versions"]["facts"]["torch"]
    assert by_check["hub cache"]["detail"].endswith("for ~/<secret>/hub")
    assert "alice" not in out and "hf_secret" not in out


def test_failures_have_status_1_and_name_the_cure(tmp_path, recipe):
    """A cluster at whose address nothing listens, and a model without weights on this machine, which is still checked."""
    (tmp_path / "model" / "model.safetensors").unlink()
    process = start(tmp_path, "--recipe", "recipe.yaml", "--timeout", "100", "--ray-address", "127.0.0.1:9")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    lines = out.splitlines()
    faults = [number for number, line in enumerate(lines) if line.startswith("failed ")]
    cluster, model = (lines[number] for number in faults)
    assert "the Ray cluster at 127.0.0.1:9 cannot be joined" in cluster and "→ see on the head node" in lines[faults[0] + 1]
    assert "holds no safetensors files" in model and "→ copy the weights there too" in lines[faults[1] + 1]
    assert lines[-1].endswith(" 2 failed")


def worker_of(process: subprocess.Popen, busy: bool = False) -> psutil.Process:
    """Return the process that does the command's work; busy: once it has started a process itself."""
    deadline = time.monotonic() + 60
    while True:
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "megatron_aspo.doctor.worker" in child.cmdline() and (not busy or child.children()):
                    return child
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)


def test_a_hanging_worker_is_killed_in_time_and_its_phase_is_named(tmp_path):
    process = start(tmp_path, "--timeout", "2")
    worker = worker_of(process, busy=True)
    worker.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "hung while checking this machine: no answer within 2 s" in out
    assert time.monotonic() - started < 20 and not worker.is_running()


def test_a_worker_that_dies_is_a_failure_too(tmp_path):
    process = start(tmp_path)
    worker_of(process).kill()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "its process ended while" in out


def test_an_interrupt_ends_the_worker_too(tmp_path):
    process = start(tmp_path)
    worker = worker_of(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not worker.is_running()


def test_an_interrupt_during_the_workers_start_ends_it_too(monkeypatch):
    started = []

    class Interrupted(subprocess.Popen):
        def _execute_child(self, *arguments) -> None:
            super()._execute_child(*arguments)
            started.append(psutil.Process(self.pid))
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if a shell started the suite in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            next(examine(Request("", [], "", 1.0, 10.0, False)))
    finally:
        signal.signal(signal.SIGINT, before)
    (worker,) = started
    assert not worker.is_running()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "missing.yaml"), "there is no recipe missing.yaml"),
        (("--recipe", "recipe.yaml", "--set", "trainer.tensor_paralel=2"), "did you mean trainer.tensor_parallel"),
        (("--set", "steps=3"), "steps=3 changes a recipe, and there is none; name it with --recipe"),
        (("--bandwidth", "2"), "name the cluster by --ray-address"),
        (("--ray-address", "head"), "is not HOST:PORT"),
        (("--ray-address", "ray://head:10001x"), "is not HOST:PORT"),
        (("--timeout", "0"), "--timeout 0 must be a finite number of seconds above 0"),
        (("--ray-address", "head:6379", "--bandwidth", "-1"), "--bandwidth -1 must be"),
    ],
)
def test_misuse_is_one_line_and_status_2(tmp_path, recipe, arguments, message):
    done = run_main(main, "doctor", *arguments, cwd=tmp_path)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith("megatron-aspo: error: ") and message in line and not done.stdout


def test_the_table_groups_records_by_check_and_has_a_cure_below_each_fault():
    records = [warning("ports", "taken", "end it"), ok("versions", "fine"), failed("torch", "broken", "mend it"), ok("ports", "free")]
    lines = [*format_table(sort_records(records))]
    assert [line.split()[0] for line in lines[:-2]] == ["ok", "failed", "→", "warning", "→", "ok"]
    assert lines[-1] == "2 ok, 1 warnings, 1 failed"


def test_secrets_homes_and_the_user_are_removed_and_nothing_else():
    environment = {"HOME": "/data/people/alice", "RAY_AUTH_TOKEN": "0123456789abcdef", "AWS_ACCESS_KEY_ID": "AKIA123", "KEYBOARD": "querty"}
    clean = redactor(environment, "alice")
    assert clean("/data/people/alice/runs on alice-laptop") == "~/runs on <user>-laptop"
    assert clean("/home/bob/model by malice") == "/home/<user>/model by malice"
    assert clean("token 0123456789abcdef AKIA123 querty") == "token <secret> <secret> querty"
    assert redactor({"HOME": "/root"}, "root")("/root/x of root on /rooting") == "~/x of root on /rooting"
