"""Evaluation of an OpenAI-compatible server: what is sent, what is retried, and what is refused. A real server is in tests/e2e."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_aspo.errors import UserError
from megatron_aspo.evaluation.endpoint import Endpoint
from megatron_aspo.rollout.engine import Request

ASKED = [{"role": "user", "content": "2 + 2?"}]


class Server(ThreadingHTTPServer):
    """Answers each chat with its seed; `replies` are sent first, as (status, body)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
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
        self.reply(*(self.server.replies.pop(0) if self.server.replies else (200, answer(f"seed {asked['seed']}"))))

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


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield made
        made.shutdown()


def request(number=0, asked=(1,)):
    return Request(f"evaluation, prompt 0 (p), response {number}", asked, 40 + number, 64, 0.8, 0.95)


def respond(server, requests, messages=None, model="", stop=()):
    found = {}
    endpoint = Endpoint(server.url, model, messages or {(1,): ASKED}, 2, stop)
    endpoint.respond(requests, 1, found.__setitem__)
    return found


def test_each_request_is_answered_with_its_own_seed_and_sampling(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    found = respond(server, [request(number) for number in range(9)], stop=["###"])
    assert {position: reply.text for position, reply in found.items()} == {n: f"seed {40 + n}" for n in range(9)}
    assert (found[0].tokens, found[0].token_ids, found[0].finish_reason) == (3, None, "stop")
    path, sent = min(server.received, key=lambda entry: entry[1]["seed"])
    options = {"seed": 40, "temperature": 0.8, "top_p": 0.95, "max_tokens": 64, "stop": ["###"], "model": "small"}
    assert path == "/v1/chat/completions" and sent == options | {"messages": ASKED}
    assert set(server.keys) == {"Bearer secret"}


def test_a_prompt_that_is_text_is_completed_as_it_is(server):
    (reply,) = respond(server, [request()], {(1,): "def add("}).values()
    path, sent = server.received[0]
    assert path == "/v1/completions" and sent["prompt"] == "def add(" and "messages" not in sent and reply.text == "seed 40"


def test_an_overloaded_server_is_asked_again(server):
    server.replies = [(429, {"error": {"message": "slow down"}}), (503, {}), (500, {})]
    assert respond(server, [request()])[0].text == "seed 40" and len(server.received) == 4


def test_reasoning_that_the_server_split_off_is_part_of_the_response(server):
    server.replies = [(200, answer("4", reasoning_content="two and two")), (200, answer(None, "length", reasoning="two and"))]
    found = respond(server, [request(0), request(1)])
    assert sorted((reply.text, reply.finish_reason) for reply in found.values()) == [
        ("<think>two and two</think>4", "stop"),
        ("<think>two and</think>", "length"),
    ]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((400, {"error": {"message": "max_tokens is too large"}}), "did not answer evaluation, prompt 0 (p), response 0: BadRequestError"),
        ((200, answer("4", "content_filter")), "ended evaluation, prompt 0 (p), response 0 with finish_reason 'content_filter'"),
        ((200, answer("4", usage=False)), "does not report token counts"),
    ],
)
def test_an_answer_that_cannot_be_used_ends_the_evaluation_in_one_line(server, reply, said):
    server.replies = [reply]
    with pytest.raises(UserError) as error:
        respond(server, [request()])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_model_is_the_one_that_is_served_or_has_to_be_chosen(server):
    assert Endpoint(server.url, "", {}, 1, []).model == "small"
    server.models = ["small", "large"]
    assert Endpoint(server.url, "large", {}, 1, []).model == "large"
    with pytest.raises(UserError, match=r"serves 2 models \(small, large\); choose one with --model"):
        Endpoint(server.url, "", {}, 1, [])
    with pytest.raises(UserError, match="serves small, large, not huge; correct --model"):
        Endpoint(server.url, "huge", {}, 1, [])


def test_a_server_that_does_not_answer_is_named_at_once():
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/v1 does not list its models"):
        Endpoint("http://127.0.0.1:9/v1", "", {}, 1, [])
