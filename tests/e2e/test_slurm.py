"""The batch file of examples/slurm on a Slurm of two nodes: it ends when a part dies, requeues into the resumed run, and leaves nothing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.slurm import Slurm, missing, two_nodes
from tests.e2e.workplace import ROOT, make_workplace, metrics

# Nightly: the cases repeat on Slurm what the launcher's tests hold, and Slurm is not installed everywhere.
pytestmark = [pytest.mark.nightly, pytest.mark.long, pytest.mark.skipif(bool(missing()), reason=missing())]
BATCH = ROOT / "examples" / "slurm" / "megatron_aspo.sbatch"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with two_nodes(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def place(tmp_path):
    yield tmp_path
    # Whatever a test left undone: the steps of its jobs.
    left = [process for process in psutil.process_iter() if str(tmp_path) in environment_of(process).get("SLURM_SUBMIT_DIR", "")]
    for process in left:
        process.kill()


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def submit(slurm: Slurm, place: Path, command: str, *options: str, **variables: str) -> str:
    given = {
        "COMMAND": command,
        "SETUP_COMMAND": f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}",
        "GPUS_PER_NODE": "0",
        "ONE_MACHINE": "1",
        "RAY_ARGS": "--num-cpus=2 --object-store-memory=200000000",
        "SHARED_DIR": str(place),
    }
    words = ["sbatch", "--parsable", "--nodes=2", "--time=10", f"--output={place}/job.out", *options, str(BATCH)]
    return slurm.run(*words, cwd=place, **(given | variables)).strip()


def finished(job: dict[str, str]) -> bool:
    return job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def steps_left(place: Path) -> list[str]:
    """Processes of this test's jobs that are still there, after the seconds that Slurm takes to end steps."""
    deadline = time.monotonic() + 30
    while True:
        left = [process for process in psutil.process_iter() if environment_of(process).get("SLURM_SUBMIT_DIR") == str(place)]
        if not left or time.monotonic() > deadline:
            return [str(process) for process in left]
        time.sleep(0.5)


def raylet_of(place: Path, node: str) -> psutil.Process:
    """The Ray daemon that a Slurm node runs."""
    (found,) = (
        process
        for process in psutil.process_iter()
        if process.name() == "raylet"
        and environment_of(process).get("SLURM_SUBMIT_DIR") == str(place)
        and environment_of(process).get("SLURMD_NODENAME") == node
    )
    return found


def test_a_command_that_succeeds_completes_the_job_and_had_the_whole_cluster(slurm, place):
    asked = 'echo "$NNODES nodes, $GPUS_PER_NODE GPUs, $RAY_AUTH_MODE, $(stat -c %a $RAY_AUTH_TOKEN_PATH)" >asked; ray status >status 2>&1'
    number = submit(slurm, place, asked)
    job = slurm.wait(number, finished, "the end")
    out = (place / "job.out").read_text()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), out
    assert (place / "asked").read_text() == "2 nodes, 0 GPUs, token, 600\n"
    assert (place / "status").read_text().count("1 node_") == 2
    for phase in ("start", "canary", "ray", "run", "end"):
        assert f"s {phase}] " in out
    assert "2 of 2 nodes have joined" in out and "all 2 nodes share" in out
    # The token and the canary are gone, and so is Ray.
    assert not list(place.rglob("ray_token")) and not list(place.glob(".canary*")) and not steps_left(place)


def test_an_error_that_a_user_can_cure_is_not_tried_again(slurm, place):
    job = slurm.wait(submit(slurm, place, "exit 2"), finished, "the end")
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert "COMMAND ended with status 2" in (place / "job.out").read_text() and not steps_left(place)


def test_the_job_ends_when_a_part_of_it_dies(slurm, place):
    number = submit(slurm, place, "touch begun; exec sleep 600", MAX_REQUEUES="0")
    slurm.wait(number, lambda job: (place / "begun").exists() or finished(job), "the begin")
    raylet_of(place, "n2").kill()
    job = slurm.wait(number, finished, "the end", limit_s=60)
    out = (place / "job.out").read_text()
    assert job["JobState"] == "FAILED" and job["Restarts"] == "0", out
    assert "ray_1 ended with status" in out and "    ray_1: " in out and not steps_left(place)


def test_before_the_time_limit_the_run_ends_in_order_and_the_job_is_requeued(slurm, place):
    (place / "command.sh").write_text(
        "if ((${SLURM_RESTART_COUNT:-0})); then exit 0; fi\ntrap 'echo in order >ended; exit 143' TERM\ntouch begun\n"
        "while :; do sleep 1 & wait $!; done\n"
    )
    number = submit(slurm, place, "bash command.sh", "--time=2", "--signal=B:TERM@60", MAX_REQUEUES="0")
    job = slurm.wait(number, finished, "the end", limit_s=240)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), (place / "job.out").read_text()
    assert (place / "ended").read_text() == "in order\n"


def test_without_a_command_the_cluster_waits_for_an_attached_shell(slurm, place):
    number = submit(slurm, place, "")
    logs = place / f"{number}-logs" / "attempt_0"
    slurm.wait(number, lambda job: (logs / "attach.sh").exists() or finished(job), "the attach script")
    environment = os.environ | {"SLURM_CONF": str(slurm.directory / "slurm.conf")}
    # script(1) gives it the terminal that it asks for.
    shell = subprocess.run(
        ["script", "-qec", f"bash {logs}/attach.sh", "/dev/null"],
        input="ray status | grep -c '1 node_' >counted; exit\n",
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (place / "counted").read_text() == "2\n", shell.stdout
    (logs / "ENDED").touch()
    assert slurm.wait(number, finished, "the end", limit_s=60)["JobState"] == "COMPLETED" and not steps_left(place)


def test_a_run_that_loses_a_node_is_requeued_and_goes_on_from_its_checkpoint(slurm, place):
    make_workplace(place)
    options = "name=run checkpoint.every=1 steps=3 evaluation.draws=0"
    command = f"exec megatron-aspo train recipe.yaml {options} --resume auto --ray-address $RAY_ADDRESS"
    number = submit(slurm, place, command, RAY_ARGS="--num-cpus=4 --object-store-memory=200000000", MAX_REQUEUES="1")
    run = place / "runs" / "run"
    slurm.wait(number, lambda job: (run / "checkpoints" / "step_1").exists() or finished(job), "the first checkpoint", limit_s=400)
    raylet_of(place, "n2").kill()
    job = slurm.wait(number, finished, "the end", limit_s=500)
    out = (place / "job.out").read_text()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), out
    assert "requeueing: the job goes on from its newest checkpoint" in out
    assert [step["step"] for step in metrics(run)] == [0, 1, 2] and (run / "exports" / "step_3").is_dir()
    # The second attempt did not do again what the checkpoint had.
    redone = run / "metrics.superseded.jsonl"
    assert not redone.exists() or '"step": 0' not in redone.read_text()
    assert not steps_left(place)
