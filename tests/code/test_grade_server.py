"""megatron-aspo grade-server as seen from another machine, and the reward that calls it."""

import base64
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests
import sandbox_fusion

from megatron_aspo.commands.grade_server import interface_of
from megatron_aspo.common.errors import UserError
from megatron_aspo.data.records import Prompt
from megatron_aspo.evaluation.plan import make_plan
from megatron_aspo.rewards.named import build_rewards
from megatron_aspo.rewards.process import RewardProcess
from megatron_aspo.rewards.service.options import ServiceOptions
from megatron_aspo.rewards.service.rules import require_rules
from megatron_aspo.rewards.service.server import GradingServer, Handler
from megatron_aspo.rewards.service.workers import Workers
from megatron_aspo.tasks.options import DataOptions

ROOT = Path(__file__).parents[2]
ADD_ONE = "```python\nprint(int(input()) + 1)\n```"
TESTS = [{"input": "1\n", "output": "2\n", "testtype": "stdin", "metadata": {}}]


class Service:
    """A server process."""

    def __init__(self, directory: Path, port: int = 0, words: Sequence[str] = ()):
        self.token_file = directory / "token"
        if not self.token_file.exists():
            self.token_file.write_text(secrets.token_hex(16))
            self.token_file.chmod(0o600)
        command = ["-m", "megatron_aspo", "grade-server", "--port", str(port), "--workers", "2", "--token-file", self.token_file]
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command), "--max-body-mib", "8", *words], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        line = self.process.stdout.readline()
        self.port = int(re.search(r"http://127\.0\.0\.1:(\d+); token in", line)[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.headers = {"Authorization": f"Bearer {self.token_file.read_text()}"}

    def post(self, path="/grade", **options) -> requests.Response:
        return requests.post(self.url + path, **{"headers": self.headers, "timeout": 60} | options)

    def options(self, **changes) -> DataOptions:
        service = ServiceOptions(**{"url": self.url, "token_file": str(self.token_file)} | changes)
        return DataOptions(reward="remote", service=service)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def service(sandboxed, tmp_path_factory):
    service = Service(tmp_path_factory.mktemp("service"))
    yield service
    family = service.family()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(20) == 143
    assert not psutil.wait_procs(family, timeout=10)[1]


def question(answer="7", truth="7", source="gsm8k", **more):
    return {"response": f"\\boxed{{{answer}}}", "ground_truth": truth, "data_source": source} | more


def test_mathematics_and_programs_are_graded_by_their_source(service):
    right, wrong = service.post(json=question("14/2")).json(), service.post(json=question("8")).json()
    assert (right["score"], right["failure"], right["details"]["verdict"]) == (1.0, "", "right") and wrong["score"] == 0.0
    program = {"response": ADD_ONE, "ground_truth": TESTS, "data_source": "livecodebench"}
    assert service.post(json=program).json()["details"]["verdict"] == "passed"


def test_64_clients_at_once_get_the_right_answers(service):
    def ask(number: int) -> list[float]:
        with requests.Session() as session:
            session.headers.update(service.headers)
            rows = [question(str(number + extra), str(number)) for extra in (0, 1, 0)]
            return [session.post(service.url + "/grade", json=row, timeout=60).json()["score"] for row in rows]

    with ThreadPoolExecutor(64) as clients:
        assert list(clients.map(ask, range(64))) == [[1.0, 0.0, 1.0]] * 64


def test_clients_that_send_nothing_or_half_a_request_block_no_others(service):
    half = f"POST /grade HTTP/1.1\r\nContent-Length: 99\r\nAuthorization: {service.headers['Authorization']}\r\n\r\n{{"
    with contextlib.ExitStack() as stack:
        for sent in (b"", b"POST", half.encode()) * 20:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", service.port)))
            connection.sendall(sent)
        assert service.post(json=question(), timeout=10).json()["score"] == 1.0


def test_a_body_of_a_gigabyte_is_refused_unread(service):
    memory = psutil.Process(service.process.pid).memory_info().rss
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        head = f"POST /grade HTTP/1.1\r\nHost: x\r\nContent-Length: {1 << 30}\r\nAuthorization: {service.headers['Authorization']}\r\n\r\n"
        connection.sendall(head.encode())
        sent, block = 0, b" " * (1 << 20)
        with contextlib.suppress(ConnectionError):
            while sent < 1 << 30:
                connection.sendall(block)
                sent += len(block)
        assert sent < 100 << 20
    assert psutil.Process(service.process.pid).memory_info().rss - memory < 64 << 20
    refused = service.post(data=b" " * (9 << 20))
    assert refused.status_code == 413 and "--max-body-mib" in refused.json()["error"]


def test_only_requests_with_the_token_are_answered(service):
    def status(path="/grade", **headers: str) -> int:
        return requests.post(service.url + path, json=question(), headers=headers, timeout=30).status_code

    token = service.token_file.read_text()
    basic = {kind: "Basic " + base64.b64encode(f"any:{word}".encode()).decode() for kind, word in (("right", token), ("wrong", "x" * 32))}
    assert status() == status(Authorization="Bearer wrong") == status(Authorization=f"Bearer {token}x") == 401
    assert status(Authorization=basic["wrong"]) == status(Authorization="Basic ?") == status(Authorization="Bearer \xe9") == 401
    assert status("/run_code") == status("/nothing") == 401
    assert status(Authorization=basic["right"]) == 200
    assert requests.get(service.url + "/metrics", timeout=30).status_code == 401
    health = requests.get(service.url + "/health", timeout=30)
    assert health.status_code == 200 and health.json()["status"] == "ok" and token not in health.text


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/grade", "{", 400, "the body is no JSON"),
        ("/grade", "[1]", 400, "the body is no JSON object"),
        ("/grade", "[" * 100_000, 400, "the body is no JSON"),
        ("/grade", "{}", 400, "the field response is missing; add it"),
        ("/grade", json.dumps(question() | {"response": 1}), 400, "response is a int, expected text"),
        ("/grade", json.dumps(question(source="poems")), 422, "data_source='poems' names no reward"),
        ("/grade", json.dumps(question(truth=None)), 422, "ground_truth is a NoneType"),
        ("/grade/", "{}", 404, "POST /grade/ is not answered here"),
        ("/health", "{}", 405, "POST /health is not answered here"),
        ("/run_code", '{"code": "1", "language": "bash"}', 422, "language=bash with code: only python is run here"),
        ("/run_code", '{"code": "1", "language": "python", "files": {"a": "b"}}', 422, "files are not taken here"),
        ("/run_code", '{"code": "1", "language": "python", "flags": 1}', 422, "flags is no field of /run_code here"),
        ("/run_code", '{"code": 1, "language": "python"}', 422, "code is a int"),
        ("/run_code", '{"code": "1", "language": "python", "memory_limit_MB": 1}', 422, "memory_limit_MB is below this server's"),
    ],
    ids=range(14),
)
def test_a_refused_request_gets_the_reason_and_the_next_is_answered(service, path, body, status, message):
    refused = service.post(path, data=body)
    assert refused.status_code == status and message in refused.json()["error"]
    assert service.post(json=question()).json()["score"] == 1.0


def test_metrics_count_the_answers_by_their_status(service):
    def count(status: int) -> int:
        text = requests.get(service.url + "/metrics", headers=service.headers, timeout=30).text
        found = re.search(rf'^megatron_aspo_grade_answers_total{{path="/grade",status="{status}"}} (\d+)$', text, re.MULTILINE)
        return int(found[1]) if found else 0

    before = count(200), count(400)
    service.post(json=question())
    service.post(data="{")
    assert (count(200), count(400)) == (before[0] + 1, before[1] + 1)


def test_it_listens_on_one_interface_and_loads_no_torch(service):
    listening = [found.laddr.ip for found in psutil.Process(service.process.pid).net_connections() if found.status == "LISTEN"]
    assert listening == ["127.0.0.1"]
    loaded = {Path(mapped.path).name for one in (psutil.Process(service.process.pid), *service.family()) for mapped in _maps(one)}
    assert not any(name.startswith("libtorch") for name in loaded)


def _maps(process: psutil.Process) -> list:
    try:
        return process.memory_maps()
    except psutil.Error:
        return []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0", "", "nowhere", "::1"])
def test_an_address_of_every_interface_or_of_none_is_refused(host):
    with pytest.raises(UserError, match=r"--host .* (would listen on every interface|is no address|is not an IPv4 address)"):
        interface_of(host)
    assert (interface_of("all"), interface_of("localhost"), interface_of("10.0.0.5")) == ("0.0.0.0", "127.0.0.1", "10.0.0.5")


def test_sandbox_fusions_own_client_gets_the_results_of_programs(service):
    endpoint = f"http://any:{service.token_file.read_text()}@127.0.0.1:{service.port}"

    def run(code: str, **more) -> sandbox_fusion.RunCodeResponse:
        request = sandbox_fusion.RunCodeRequest(code=code, language="python", **more)
        return sandbox_fusion.run_code(request, endpoint=endpoint, max_attempts=1, client_timeout=60)

    done = run("import sys\nprint(input()[::-1])\nprint('x', file=sys.stderr)", stdin="abc\n")
    assert (done.status, done.run_result.stdout, done.run_result.return_code) == ("Success", "cba\n", 0)
    assert done.run_result.status == "Finished" and "x" in done.run_result.stderr and done.run_result.execution_time > 0
    failed = run("raise SystemExit(3)")
    assert (failed.status, failed.run_result.status, failed.run_result.return_code) == ("Failed", "Finished", 3)
    assert "ZeroDivisionError" in run("1 / 0").run_result.stderr
    endless = run("while True: pass", run_timeout=1)
    assert (endless.status, endless.run_result.status, endless.run_result.return_code) == ("Failed", "TimeLimitExceeded", None)
    assert run("open('/etc/shadow').read()").status == run("import socket; socket.create_connection(('1.1.1.1', 80))").status == "Failed"
    assert sandbox_fusion.summary_run_code_result(endless, sandbox_fusion.SummaryMapping(RunTimeout="slow")) == "slow"


def test_the_remote_reward_returns_the_servers_score(service):
    reward = build_rewards(service.options())
    row = Prompt("p", (), "What?", "7", "gsm8k")
    assert [reward(row, f"\\boxed{{{answer}}}").score for answer in ("7", "8")] == [1.0, 0.0]
    with pytest.raises(
        UserError, match=r"data.reward=remote on prompt p: http://.*/grade refused a request \(status 422: .*names no reward"
    ):
        reward(Prompt("p", (), "What?", "7", "poems"), "7")


def test_the_remote_reward_compares_the_outputs_of_run_code(service):
    fusion = DataOptions(
        reward="remote",
        reward_wrong_score=-1.0,
        service=ServiceOptions(url=f"http://any:{service.token_file.read_text()}@127.0.0.1:{service.port}", protocol="sandbox_fusion"),
    )
    reward = build_rewards(fusion)
    row = Prompt("p", (), "", TESTS, "code")
    programs = (ADD_ONE, ADD_ONE.replace("+ 1", "+ 2"), "```python\n1 / 0\n```", "none")
    verdicts = [(result.score, result.details["verdict"]) for result in (reward(row, program) for program in programs)]
    assert verdicts == [(1.0, "passed"), (-1.0, "wrong answer"), (-1.0, "runtime error"), (-1.0, "no code")]
    with pytest.raises(UserError, match="its tests are calls or assertions"):
        reward(Prompt("p", (), "", {"functional": "assert f() == 1"}, "code"), ADD_ONE)


def test_an_evaluation_asks_a_server_only_if_it_grades_by_the_protocols_rules(service, tmp_path):
    """The session's server grades by defaults: 6 s a test, the last block."""
    remote = ["data.reward=remote", "samples=8", f"data.service.token_file={service.token_file}"]
    slow = Service(tmp_path, words=["--protocol", "archer_lcb_v5", "data.code.limits.cpu_s=20"])
    try:
        here = [f"data.service.url={slow.url}", f"data.service.token_file={slow.token_file}"]
        plan = make_plan("archer_lcb_v5", None, ["none.jsonl"], [*remote, *here, "data.code.limits.cpu_s=20"])
        assert plan.changed == {"data.code.limits.cpu_s": 20.0} and plan.settings.data.service.attempt_s > 3600
        require_rules(plan.settings.data, plan.server_rules, "…")
        response = "</think>\n```python\nwhile True:\n    pass\n```\nor\n```python\nprint(2)\n```\nnot\n```\nprint(3)\n```"
        result = build_rewards(plan.settings.data)(Prompt("p", (), "", TESTS, "livecodebench_v5"), response)
        assert result.details["verdict"] == "passed"
        plan = make_plan("archer_lcb_v5", None, ["none.jsonl"], [*remote, *here])
        with pytest.raises(UserError, match=rf"{slow.url} grades with data\.code\.limits\.cpu_s=20\.0, not 150\.0; start it with S"):
            require_rules(plan.settings.data, plan.server_rules, "S")
    finally:
        slow.process.terminate()
        slow.process.wait(20)
    plan = make_plan("archer_lcb_v5", None, ["none.jsonl"], [*remote, f"data.service.url={service.url}"])
    with pytest.raises(UserError, match=rf"{service.url} grades with data\.reward=by_source, not code"):
        require_rules(plan.settings.data, plan.server_rules, "S")
    plan = make_plan("archer_lcb_v5", None, [], [*remote, f"data.service.url={service.url}", "data.service.protocol=sandbox_fusion"])
    with pytest.raises(UserError, match="does not say by which limits it grades"):
        require_rules(plan.settings.data, plan.server_rules, "S")


def test_a_server_that_is_killed_and_restarted_loses_no_verdict(sandboxed, tmp_path):
    first = Service(tmp_path)
    family = first.family()
    rows = [(Prompt(f"p{n}", (), "", str(n), "gsm8k"), f"\\boxed{{{n + n % 2}}}") for n in range(400)]
    process = RewardProcess("dataset", first.options(attempt_s=5.0), os.getcwd())
    process.start()
    again: list[Service] = []

    def kill_and_restart() -> None:
        first.process.kill()
        first.process.wait()
        time.sleep(0.5)
        again.append(Service(tmp_path, first.port))

    try:
        scores, restarting = [], threading.Thread(target=kill_and_restart)
        for result in process.score(rows):
            if len(scores) == 20:
                restarting.start()
            scores.append((result.score, result.failure))
        restarting.join()
        assert scores == [(float(n % 2 == 0), "") for n in range(400)]
        assert not psutil.wait_procs(family, timeout=5)[1]
        assert again[0].process.poll() is None
    finally:
        process.close()
        for one in again:
            one.process.terminate()
            one.process.wait(20)


def test_an_unreachable_server_ends_the_run_naming_its_address(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    reward = build_rewards(DataOptions(reward="remote", service=ServiceOptions(url=f"http://127.0.0.1:{port}", give_up_s=0.5)))
    began = time.monotonic()
    with pytest.raises(
        UserError, match=rf"127.0.0.1:{port}/grade gave no answer for data.service.give_up_s=0.5 s \(ConnectionError.*start the"
    ):
        reward(Prompt("p", (), "", "7", "gsm8k"), "7")
    assert time.monotonic() - began < 5


class Overloaded(Workers):
    """Refuses the given number of requests, then scores."""

    refusals = 2

    def score(self, prompt, response):
        from megatron_aspo.rewards.service.workers import Busy

        if self.refusals:
            self.refusals -= 1
            raise Busy
        return build_rewards(DataOptions(reward="math"))(prompt, response)


def test_an_overloaded_server_is_retried_and_a_silent_connection_is_closed(monkeypatch):
    monkeypatch.setattr(Handler, "timeout", 0.3)
    workers = Overloaded("dataset", DataOptions(reward="math"), 1)
    with GradingServer(("127.0.0.1", 0), "t" * 16, workers, 1 << 20, "math", {}) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = "http://any:" + "t" * 16 + f"@127.0.0.1:{server.server_address[1]}"
        reward = build_rewards(DataOptions(reward="remote", service=ServiceOptions(url=url)))
        assert reward(Prompt("p", (), "", "7", "gsm8k"), "\\boxed{7}").score == 1.0
        assert workers.refusals == 0
        with socket.create_connection(server.server_address, timeout=10) as silent:
            assert silent.recv(1) == b""
        server.shutdown()
