"""An OpenAI-compatible server for tests, whose answers come from a function."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Answers each request with `text_of(request)`; `replies` are sent first, as (status, body)."""

    def __init__(self, text_of: Callable[[dict[str, Any]], str]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.text_of = text_of
        self.models, self.replies, self.received, self.keys = ["small"], [], [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "us"} for name in self.server.models]
        self.reply(200, {"object": "list", "data": models})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.received.append((self.path, asked))
        self.server.keys.append(self.headers["Authorization"])
        self.reply(*(self.server.replies.pop(0) if self.server.replies else (200, answer(self.server.text_of(asked)))))

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), "retry-after-ms": "1"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


def answer(text, finish_reason="stop", usage=True, **message):
    choice = {"index": 0, "finish_reason": finish_reason, "text": text, "message": {"role": "assistant", "content": text, **message}}
    counts = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "small", "choices": [choice], "usage": counts if usage else None}


@contextmanager
def serving(text_of: Callable[[dict[str, Any]], str]) -> Iterator[Server]:
    with Server(text_of) as made:
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield made
        made.shutdown()
