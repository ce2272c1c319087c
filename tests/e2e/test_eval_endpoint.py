"""Evaluation of vLLM's own OpenAI-compatible server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from megatron_aspo.evaluation.records import read_responses
from tests.e2e.workplace import RUN_S, start_command

pytestmark = [pytest.mark.long, pytest.mark.nightly]
GREEDY = ["--set", "samples=1", "temperature=0", "max_response_tokens=12", "data.reward=my_rewards:vowels", "data.max_prompt_tokens=256"]


@pytest.fixture(scope="module")
def url(workplace):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = ["--model", "model", "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", port, "--dtype", "float32"]
    words += ["--enforce-eager", "--max-model-len", "512", "--generation-config", "vllm", "--kv-cache-memory-bytes", str(1 << 28)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with (workplace / "server.log").open("w") as log:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]
        server = subprocess.Popen(command, cwd=workplace, env=environment, stdout=log, stderr=log)
        try:
            wait_for_models(f"http://127.0.0.1:{port}/v1/models", server, workplace / "server.log")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(60)


def wait_for_models(url, server, log):
    deadline = time.monotonic() + RUN_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)


def run_eval(workplace, target, out):
    process = start_command(workplace, "eval", target, "--data", "held_out.jsonl", "--out", out, *GREEDY)
    printed, error = process.communicate(timeout=RUN_S)
    assert process.returncode == 0, error
    responses = [response for path in sorted((workplace / out).glob("parts/*.parquet")) for response in read_responses(path)]
    return json.loads(printed.splitlines()[-1]), responses


def test_a_server_gives_the_greedy_responses_of_our_engine(workplace, url):
    ours, expected = run_eval(workplace, "model", "by_engine")
    theirs, found = run_eval(workplace, url, "by_server")
    assert len(found) == 4 and all(response.response_ids is None for response in found)
    # The server withholds trailing bytes that are no whole character; a decoder of whole responses shows them.
    assert [(r.problem, r.response, r.tokens, r.finish_reason, r.score) for r in found] == [
        (r.problem, r.response.rstrip("\ufffd"), r.tokens, r.finish_reason, r.score) for r in expected
    ]
    assert theirs["metrics"] == ours["metrics"]
    record = json.loads((workplace / "by_server" / "evaluation.json").read_text())
    assert record["model"]["endpoint"] == url and "sha256" in record["data"]
