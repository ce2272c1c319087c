"""The HTTP side of a grading server: authentication, parsing of requests, and status codes.

| request | answer |
|---|---|
| `POST /grade`, a row in the format of `megatron-aspo grade` | `{score, reason, details, failure}` |
| `POST /run_code`, in SandboxFusion's format | SandboxFusion's response |
| `GET /rules` | the rules of `rules.py` by which it grades: key path → value |
| `GET /health` (no token) | `{"status": "ok", …}` |
| `GET /metrics` | counts and seconds in Prometheus' text format |

Status 400: invalid JSON, row or field; 401: missing or wrong token; 404, 405; 411 and 413: a body of unknown length, or one that is too
large, which is not read; 422: the reward raised, or cannot grade the row; 503: too many requests wait.

The token is in `Authorization`: `Bearer TOKEN`, or as the password of HTTP's basic scheme (`http://any:TOKEN@HOST:PORT`), the only one that
SandboxFusion's client can send.
"""

import base64
import binascii
import contextlib
import hmac
import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from megatron_aspo import __version__
from megatron_aspo.common.errors import UserError
from megatron_aspo.rewards.response_row import ResponseRow
from megatron_aspo.rewards.service.rules import PATH
from megatron_aspo.rewards.service.workers import Busy, Workers

SILENCE_S = 30.0
"""A connection that is silent for this long is closed."""
_MAX_CONNECTIONS = 1024
"""Maximum number of connections, each with a thread; further ones are closed at once."""
_DRAINED_BYTES = 1 << 20
"""Upper bound on the bytes read of a refused request's body, so that the client sees the answer and not a broken connection."""


class GradingServer(ThreadingHTTPServer):
    """The listening server; each connection's thread waits for `workers`."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, address: tuple[str, int], token: str, workers: Workers, max_body_bytes: int, name: str, rules: Mapping[str, Any]):
        """address: numeric. name: the reward's name in /health. rules: the answer of /rules. Raises OSError if the
        address is not available."""
        self.token, self.workers, self.max_body_bytes, self.name, self.rules = token, workers, max_body_bytes, name, rules
        self.statistics = Statistics()
        self._connections = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the thread of a connection, unless there are too many."""
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection to its end, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the error: a client that disconnects is no fault of the server, and every other error has an answer."""


class Statistics:
    """Counts of a server's answers; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: Counter[tuple[str, int]] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def add(self, path: str, status: int, seconds: float) -> None:
        with self._lock:
            self._answers[path, status] += 1
            self._seconds[path] += seconds

    def text(self, unfinished: int) -> str:
        """Return all metrics in Prometheus' text format."""
        with self._lock:
            lines = ["# TYPE megatron_aspo_grade_answers_total counter"]
            for (path, status), count in sorted(self._answers.items()):
                lines.append(f'megatron_aspo_grade_answers_total{{path="{path}",status="{status}"}} {count}')
            lines.append("# TYPE megatron_aspo_grade_seconds_total counter")
            lines += [f'megatron_aspo_grade_seconds_total{{path="{path}"}} {value:.6f}' for path, value in sorted(self._seconds.items())]
        lines += ["# TYPE megatron_aspo_grade_unfinished gauge", f"megatron_aspo_grade_unfinished {unfinished}"]
        return "\n".join(lines) + "\n"


class _Refused(Exception):
    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """The handler of one connection."""

    server: GradingServer
    protocol_version = "HTTP/1.1"
    server_version = f"megatron_aspo/{__version__}"
    sys_version = ""
    timeout = SILENCE_S
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer({"/health": self._health, "/metrics": self._metrics, PATH: lambda: dict(self.server.rules)})

    def do_POST(self) -> None:
        self._answer({"/grade": self._grade, "/run_code": self._run_code})

    def _answer(self, paths: dict[str, Any]) -> None:
        started, path = time.monotonic(), self.path.split("?")[0]
        self._unread = self._length()
        try:
            if path != "/health" and not self._has_token():
                raise _Refused(401, "a token is needed: Authorization: Bearer TOKEN")
            if path not in paths:
                known = {"/health", "/metrics", PATH, "/grade", "/run_code"}
                raise _Refused(405 if path in known else 404, f"{self.command} {path} is not answered here")
            status, body = 200, paths[path]()
        except _Refused as refusal:
            status, body = refusal.status, {"error": str(refusal)}
        except Busy:
            status, body = 503, {"error": "too many requests wait; ask again"}
        except UserError as error:
            status, body = 422, {"error": str(error)}
        except (ConnectionError, TimeoutError):
            self.close_connection = True
            return
        except Exception as error:
            status, body = 500, {"error": f"{type(error).__name__}"}
        self.server.statistics.add(path if status not in (401, 404, 405) else "other", status, time.monotonic() - started)
        self._send(status, body)

    def _health(self) -> dict[str, Any]:
        return {"status": "ok", "version": __version__, "reward": self.server.name}

    def _metrics(self) -> str:
        return self.server.statistics.text(self.server.workers.unfinished)

    def _grade(self) -> dict[str, Any]:
        try:
            row = ResponseRow(self._json(), 0)
        except ValueError as error:
            raise _Refused(400, str(error)) from error
        result = self.server.workers.score(row.prompt, row.response)
        return {"score": result.score, "reason": result.reason, "details": result.details, "failure": result.failure}

    def _run_code(self) -> dict[str, Any]:
        return self.server.workers.run(self._json())

    def _has_token(self) -> bool:
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "basic":
            with contextlib.suppress(binascii.Error, ValueError):
                given = base64.b64decode(given.strip(), validate=True).decode().partition(":")[2]
        return hmac.compare_digest(given.strip().encode(), self.server.token.encode())

    def _length(self) -> int | None:
        """Return the body's length in bytes; None if the request does not state it."""
        text = self.headers.get("Content-Length", "" if "Transfer-Encoding" in self.headers or self.command == "POST" else "0")
        return int(text) if text.isdigit() and len(text) < 16 else None

    def _json(self) -> dict[str, Any]:
        if self._unread is None:
            raise _Refused(411, "Content-Length is missing")
        if self._unread > self.server.max_body_bytes:
            raise _Refused(413, f"the body has more than {self.server.max_body_bytes} bytes (--max-body-mib)")
        body = self.rfile.read(self._unread)
        if len(body) < self._unread:
            raise ConnectionError
        self._unread = 0
        try:
            value = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise _Refused(400, f"the body is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise _Refused(400, "the body is no JSON object")
        return value

    def _send(self, status: int, body: dict[str, Any] | str) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        if self._unread != 0:
            self.close_connection = True
        try:
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4" if isinstance(body, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status == 401:
                self.send_header("WWW-Authenticate", "Bearer")
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
            if self._unread:
                self.rfile.read(min(self._unread, _DRAINED_BYTES))
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: /metrics counts, and a line for each verdict would fill a disk."""
