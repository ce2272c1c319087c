"""Evaluation of an OpenAI-compatible server: requests, retries and refusals. A real server is tested in tests/e2e."""

from collections.abc import Iterator

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.evaluation.endpoint import Endpoint
from megatron_aspo.rollout.engine import Request
from tests.openai_server import Server, answer, serving

ASKED = [{"role": "user", "content": "2 + 2?"}]


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(lambda asked: f"seed {asked['seed']}") as made:
        yield made


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


def test_a_text_prompt_is_completed_unchanged(server):
    (reply,) = respond(server, [request()], {(1,): "def add("}).values()
    path, sent = server.received[0]
    assert path == "/v1/completions" and sent["prompt"] == "def add(" and "messages" not in sent and reply.text == "seed 40"


def test_a_request_to_an_overloaded_server_is_retried(server):
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
    ("reply", "message"),
    [
        ((400, {"error": {"message": "max_tokens is too large"}}), "did not answer evaluation, prompt 0 (p), response 0: BadRequestError"),
        ((200, answer("4", "content_filter")), "ended evaluation, prompt 0 (p), response 0 with finish_reason 'content_filter'"),
        ((200, answer("4", usage=False)), "does not report token counts"),
    ],
)
def test_an_unusable_answer_ends_the_evaluation_in_one_line(server, reply, message):
    server.replies = [reply]
    with pytest.raises(UserError) as error:
        respond(server, [request()])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_model_is_the_only_one_served_or_must_be_chosen(server):
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
