"""The batch file of examples/slurm on a Slurm of two nodes: it ends when a part dies, requeues into a resumed run, and leaves nothing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.slurm import Slurm, missing, two_nodes
from tests.e2e.workplace import ROOT, make_workplace, metrics

# Nightly, because the cases repeat the launcher's tests on Slurm, which is not installed everywhere.
pytestmark = [pytest.mark.nightly, pytest.mark.long, pytest.mark.skipif(bool(missing()), reason=missing())]
BATCH = ROOT / "examples" / "slurm" / "megatron_aspo.sbatch"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with two_nodes(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def job_directory(tmp_path):
    yield tmp_path
    # Steps of the jobs that a test left.
    left = [process for process in psutil.process_iter() if str(tmp_path) in environment_of(process).get("SLURM_SUBMIT_DIR", "")]
    for process in left:
        process.kill()


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def submit(slurm: Slurm, job_directory: Path, command: str, *options: str, **variables: str) -> str:
    given = {
        "COMMAND": command,
        "SETUP_COMMAND": f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}",
        "GPUS_PER_NODE": "0",
        "ONE_MACHINE": "1",
        "RAY_ARGS": "--num-cpus=2 --object-store-memory=200000000",
        "SHARED_DIR": str(job_directory),
    }
    words = ["sbatch", "--parsable", "--nodes=2", "--time=10", f"--output={job_directory}/job.out", *options, str(BATCH)]
    return slurm.run(*words, cwd=job_directory, **(given | variables)).strip()


def finished(job: dict[str, str]) -> bool:
    return job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def steps_left(job_directory: Path) -> list[str]:
    """Return processes of this test's jobs that still exist after the seconds that Slurm takes to end steps."""
    deadline = time.monotonic() + 30
    while True:
        left = [process for process in psutil.process_iter() if environment_of(process).get("SLURM_SUBMIT_DIR") == str(job_directory)]
        if not left or time.monotonic() > deadline:
            return [str(process) for process in left]
        time.sleep(0.5)


def raylet_of(job_directory: Path, node: str) -> psutil.Process:
    """Return the Ray daemon that a Slurm node runs."""
    (found,) = (
        process
        for process in psutil.process_iter()
        if process.name() == "raylet"
        and environment_of(process).get("SLURM_SUBMIT_DIR") == str(job_directory)
        and environment_of(process).get("SLURMD_NODENAME") == node
    )
    return found


def test_a_successful_command_completes_the_job_and_had_the_whole_cluster(slurm, job_directory):
    asked = 'echo "$NNODES nodes, $GPUS_PER_NODE GPUs, $RAY_AUTH_MODE, $(stat -c %a $RAY_AUTH_TOKEN_PATH)" >asked; ray status >status 2>&1'
    number = submit(slurm, job_directory, asked)
    job = slurm.wait(number, finished, "the end")
    out = (job_directory / "job.out").read_text()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), out
    assert (job_directory / "asked").read_text() == "2 nodes, 0 GPUs, token, 600\n"
    assert (job_directory / "status").read_text().count("1 node_") == 2
    for phase in ("start", "canary", "ray", "run", "end"):
        assert f"s {phase}] " in out
    assert "2 of 2 nodes have joined" in out and "all 2 nodes share" in out
    # The token, the canary and Ray are gone.
    assert not list(job_directory.rglob("ray_token")) and not list(job_directory.glob(".canary*")) and not steps_left(job_directory)


def test_an_error_that_a_user_can_cure_is_not_retried(slurm, job_directory):
    job = slurm.wait(submit(slurm, job_directory, "exit 2"), finished, "the end")
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert "COMMAND ended with status 2" in (job_directory / "job.out").read_text() and not steps_left(job_directory)


def test_the_job_ends_when_a_part_of_it_dies(slurm, job_directory):
    number = submit(slurm, job_directory, "touch begun; exec sleep 600", MAX_REQUEUES="0")
    slurm.wait(number, lambda job: (job_directory / "begun").exists() or finished(job), "the begin")
    raylet_of(job_directory, "n2").kill()
    job = slurm.wait(number, finished, "the end", limit_s=60)
    out = (job_directory / "job.out").read_text()
    assert job["JobState"] == "FAILED" and job["Restarts"] == "0", out
    assert "ray_1 ended with status" in out and "    ray_1: " in out and not steps_left(job_directory)


def test_before_the_time_limit_the_run_ends_cleanly_and_the_job_is_requeued(slurm, job_directory):
    (job_directory / "command.sh").write_text(
        "if ((${SLURM_RESTART_COUNT:-0})); then exit 0; fi\ntrap 'echo in order >ended; exit 143' TERM\ntouch begun\n"
        "while :; do sleep 1 & wait $!; done\n"
    )
    number = submit(slurm, job_directory, "bash command.sh", "--time=2", "--signal=B:TERM@60", MAX_REQUEUES="0")
    job = slurm.wait(number, finished, "the end", limit_s=240)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), (job_directory / "job.out").read_text()
    assert (job_directory / "ended").read_text() == "in order\n"


def test_without_a_command_the_cluster_waits_for_an_attached_shell(slurm, job_directory):
    number = submit(slurm, job_directory, "")
    logs = job_directory / f"{number}-logs" / "attempt_0"
    slurm.wait(number, lambda job: (logs / "attach.sh").exists() or finished(job), "the attach script")
    environment = os.environ | {"SLURM_CONF": str(slurm.directory / "slurm.conf")}
    # script(1) provides the terminal that it requires.
    shell = subprocess.run(
        ["script", "-qec", f"bash {logs}/attach.sh", "/dev/null"],
        input="ray status | grep -c '1 node_' >counted; exit\n",
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (job_directory / "counted").read_text() == "2\n", shell.stdout
    (logs / "ENDED").touch()
    assert slurm.wait(number, finished, "the end", limit_s=60)["JobState"] == "COMPLETED" and not steps_left(job_directory)


def test_a_run_that_loses_a_node_is_requeued_and_resumes_from_its_checkpoint(slurm, job_directory):
    make_workplace(job_directory)
    options = "name=run checkpoint.every=1 steps=3 evaluation.draws=0"
    command = f"exec megatron-aspo train recipe.yaml {options} --resume auto --ray-address $RAY_ADDRESS"
    number = submit(slurm, job_directory, command, RAY_ARGS="--num-cpus=4 --object-store-memory=200000000", MAX_REQUEUES="1")
    run = job_directory / "runs" / "run"
    slurm.wait(number, lambda job: (run / "checkpoints" / "step_1").exists() or finished(job), "the first checkpoint", limit_s=400)
    raylet_of(job_directory, "n2").kill()
    job = slurm.wait(number, finished, "the end", limit_s=500)
    out = (job_directory / "job.out").read_text()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), out
    assert "requeueing: the job goes on from its newest checkpoint" in out
    assert [step["step"] for step in metrics(run)] == [0, 1, 2] and (run / "exports" / "step_3").is_dir()
    # The second attempt did not repeat the steps of the checkpoint.
    redone = run / "metrics.superseded.jsonl"
    assert not redone.exists() or '"step": 0' not in redone.read_text()
    assert not steps_left(job_directory)
