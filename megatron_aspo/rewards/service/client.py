"""The reward that calls a grading server: ours, or one with SandboxFusion's `/run_code`. A lost request is sent again.

Retries are safe, because a grade depends only on the request.
"""

import random
import time
from typing import Any

import requests

from megatron_aspo.common.auth_token import find_token
from megatron_aspo.common.errors import UserError
from megatron_aspo.data.records import Prompt
from megatron_aspo.rewards.code.compare import outputs_match
from megatron_aspo.rewards.code.extract import extract_code
from megatron_aspo.rewards.code.schemas import StdinTest, read_tests
from megatron_aspo.rewards.result import RewardResult
from megatron_aspo.rewards.service.options import ServiceOptions

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0
_AGAIN = {429, 500, 502, 503, 504}
"""Status codes after which the request is sent again."""


class Server:
    """One connection to a server."""

    def __init__(self, options: ServiceOptions):
        """Raises UserError for options out of their bounds, and for an unreadable token."""
        options.check()
        self._options = options
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy, and no credentials of other services
        if options.token_file:
            token, _ = find_token(options.token_file, "", {}, make=False)
            self._session.headers["Authorization"] = f"Bearer {token}"

    def get(self, path: str) -> dict[str, Any]:
        """Return the server's JSON object for a GET. Raises as `post`."""
        return self._request("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the server's JSON object. Raises UserError if it refuses, or gives no answer for `give_up_s`."""
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        url = self._options.url.rstrip("/") + path
        deadline, pause = time.monotonic() + self._options.give_up_s, _FIRST_PAUSE_S
        while True:
            try:
                reply = self._session.request(method, url, json=body, timeout=self._options.attempt_s, allow_redirects=False)
                if reply.status_code == 200:
                    return reply.json()
                reason = f"status {reply.status_code}: {reply.text[:300].strip()}"
                if reply.status_code not in _AGAIN:
                    raise UserError(f"{url} refused a request ({reason}); correct data.service, or the row")
            except (requests.RequestException, ValueError) as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if time.monotonic() + pause > deadline:
                raise UserError(
                    f"{url} gave no answer for data.service.give_up_s={self._options.give_up_s:g} s ({reason}); start the server, or raise "
                    "that and data.reward_timeout_s"
                )
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE_S)


class RemoteReward:
    """A `Reward` that asks a grading server (`megatron-aspo grade-server`) for the score."""

    def __init__(self, options: ServiceOptions, wrong_score: float):
        """wrong_score: score of a program that fails a test, with SandboxFusion's protocol; our server has its own. Raises UserError."""
        self._server = Server(options)
        self._wrong_score = wrong_score
        self._runs_code = options.protocol == "sandbox_fusion"

    def __call__(self, prompt: Prompt, response: str) -> RewardResult:
        """Score a response. Raises UserError, naming the prompt, as `Server.post` does, and for tests that `/run_code` cannot express."""
        try:
            return self._run_tests(prompt, response) if self._runs_code else self._grade(prompt, response)
        except UserError as error:
            raise UserError(f"data.reward=remote on prompt {prompt.id}: {error}") from error

    def _grade(self, prompt: Prompt, response: str) -> RewardResult:
        body = {
            "prompt": prompt.text,
            "response": response,
            "ground_truth": prompt.ground_truth,
            "data_source": prompt.data_source,
            "extra": prompt.extra,
        }
        reply = self._server.post("/grade", body)
        try:
            return RewardResult(float(reply["score"]), str(reply["reason"]), dict(reply["details"]), str(reply["failure"]))
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"the server's answer is no result ({error}); name a megatron-aspo grade-server of this version") from error

    def _run_tests(self, prompt: Prompt, response: str) -> RewardResult:
        read = read_tests(prompt.ground_truth, prompt.text)
        tests = [test for test in read if isinstance(test, StdinTest)]
        if len(tests) < len(read):
            raise UserError("its tests are calls or assertions, which /run_code would have to trust; use protocol grade, or reward code")
        program = extract_code(response)
        if program is None:
            return RewardResult(self._wrong_score, "no complete code block", {"verdict": "no code"})
        for position, test in enumerate(tests):
            reply = self._server.post("/run_code", {"code": program, "language": "python", "stdin": test.input})
            if reply.get("status") == "SandboxError":
                raise UserError(f"the server has no sandbox: {str(reply.get('message'))[:300]}; mend it")
            run = reply.get("run_result") or {}
            if reply.get("status") != "Success":
                kind = "time limit" if run.get("status") == "TimeLimitExceeded" else "runtime error"
                return RewardResult(self._wrong_score, kind, {"verdict": kind, "test": position})
            if not outputs_match(str(run.get("stdout") or ""), test.output):
                return RewardResult(self._wrong_score, "standard output differs", {"verdict": "wrong answer", "test": position})
        return RewardResult(1.0, f"{len(tests)} tests passed", {"verdict": "passed", "test": None})
