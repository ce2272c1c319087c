"""A run that meets every way in which a custom reward can misbehave, and a run whose grading server is killed."""

import hashlib
import json
import secrets
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pyarrow.parquet as parquet
import pytest
import requests

from tests.e2e.misbehaving_rewards import LEFT_BEHIND, MISBEHAVIOUR
from tests.e2e.test_reward_faults import children_in
from tests.e2e.workplace import ROOT, metrics, start, train

pytestmark = pytest.mark.long
SMALL = ["steps=1", "rollout.engines=1", "trainer.tensor_parallel=1", "evaluation.draws=0"]
FAILED = -0.25


def rows_of(run: Path) -> list[dict]:
    return parquet.read_table(run / "rollouts" / "step_0.parquet").to_pylist()


def test_each_misbehaviour_of_a_reward_ends_as_configured_and_is_named(workplace):
    shutil.copy(ROOT / "tests" / "e2e" / "misbehaving_rewards.py", workplace)
    assert len(MISBEHAVIOUR) >= 20
    limits = ["data.reward_timeout_s=2", f"data.reward_failure_score={FAILED}", "data.reward_on_error=score", "data.reward_memory_gib=1"]
    many = ["rollout.prompts_per_step=8", "rollout.responses_per_prompt=8"]
    status, out, error = train(workplace, "name=misbehaving", *SMALL, *limits, *many, "data.reward=misbehaving_rewards:score")
    assert status == 0, error
    run = workplace / "runs" / "misbehaving"
    seen = {path.read_text(): int(path.name.removeprefix("seen_")) for path in workplace.glob("seen_*")}
    names, met, counts = [*MISBEHAVIOUR], set(), {"timeout": 0, "crash": 0, "error": 0}
    for row in rows_of(run):
        number = seen[hashlib.sha256((row["prompt"] + row["response"]).encode()).hexdigest()]
        details = json.loads(row["reward_details"])
        if number % 2 or number // 2 >= len(names):
            assert row["reward"] == 1.0, details
            continue
        name = names[number // 2]
        _, failure, reason = MISBEHAVIOUR[name]
        assert details["reason"].startswith(reason), (name, details)
        assert (row["reward"], details.get("failed", False)) == ((FAILED, True) if failure else (0.5, False)), name
        if failure:
            counts[failure] += 1
        met.add(name)
    assert met == set(names)
    (step,) = metrics(run)
    assert (step["reward/timeouts"], step["reward/crashes"], step["reward/errors"]) == (*counts.values(),)
    assert f"data.reward=misbehaving_rewards:score failed on {sum(counts.values())} of 64 responses; their reward is {FAILED}" in out
    assert "data.reward=misbehaving_rewards:score timed out after 2 s; its reward is -0.25 (data.reward_failure_score)" in out
    assert step["reward/worker_restarts"] == 0 and not children_in(workplace)
    assert not [one.pid for one in psutil.process_iter(["cmdline"]) if LEFT_BEHIND in (one.info["cmdline"] or [])]


def start_server(directory: Path, port: int) -> tuple[subprocess.Popen, str]:
    command = ["-m", "megatron_aspo", "grade-server", "--port", str(port), "--workers", "1", "--token-file", "token"]
    process = subprocess.Popen(
        [sys.executable, *command, "--reward", "my_rewards:vowels"],
        cwd=directory,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    return process, process.stdout.readline().partition("; token")[0].rpartition(" on ")[2]


def test_a_run_whose_grading_server_is_killed_and_restarted_loses_nothing(workplace):
    (workplace / "token").write_text(secrets.token_hex(16))
    (workplace / "token").chmod(0o600)
    servers = [start_server(workplace, 0)]
    url = servers[0][1]
    service = ["data.reward=remote", f"data.service.url={url}", f"data.service.token_file={workplace / 'token'}"]

    def answers() -> int:
        header = {"Authorization": f"Bearer {(workplace / 'token').read_text()}"}
        lines = requests.get(url + "/metrics", headers=header, timeout=10).text.splitlines()
        return sum(int(line.split()[-1]) for line in lines if line.startswith('megatron_aspo_grade_answers_total{path="/grade"'))

    def kill_and_restart() -> None:
        while answers() < 5:
            time.sleep(0.05)
        servers[0][0].kill()
        servers[0][0].wait()
        time.sleep(1)
        servers.append(start_server(workplace, int(url.rpartition(":")[2])))

    killing = threading.Thread(target=kill_and_restart, daemon=True)
    killing.start()
    try:
        run = start(workplace, "name=served", *SMALL, *service, "rollout.prompts_per_step=8", "rollout.responses_per_prompt=8")
        _, error = run.communicate(timeout=400)
        assert run.returncode == 0, error
        killing.join(30)
        assert len(servers) == 2 and answers() > 0
    finally:
        for process, _ in servers:
            process.kill()
            process.wait()
    rows = rows_of(workplace / "runs" / "served")
    assert len(rows) == 64
    for row in rows:  # as the function would score it here
        letters = row["response"]
        assert row["reward"] == sum(letter in "aeiou" for letter in letters) / max(1, len(letters))
    (step,) = metrics(workplace / "runs" / "served")
    assert (step["reward/timeouts"], step["reward/crashes"], step["reward/worker_restarts"]) == (0, 0, 0)
