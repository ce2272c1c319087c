"""Responses from an OpenAI-compatible server, such as `vllm serve`."""

import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.import_path import one_line
from megatron_aspo.data.encoder import Message
from megatron_aspo.evaluation.sampling import Reply
from megatron_aspo.rollout.engine import Request

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessage, ChatCompletionMessageParam

_RETRIES = 8
"""Retries of a request after a lost connection, a timeout, or status 429 or 5xx. The pause doubles up to 8 s unless the server sets it."""
_TIMEOUT_S = 3600.0
"""Time limit of one response: 32,768 tokens at 10 per second take 55 minutes."""


class Endpoint:
    """Sends each problem's messages to the server, whose own chat template applies. `OPENAI_API_KEY` is sent if it is set."""

    def __init__(self, url: str, model: str, messages: dict[tuple[int, ...], list[Message] | str], at_once: int, stop: Sequence[str]):
        """Connect to the server.

        model: its name on the server; empty: the only one served. messages: token ids of a prompt → its messages or its text.
        at_once: concurrent requests. Raises UserError if the server does not answer or does not serve the model.
        """
        import openai

        self._url, self._messages, self._at_once, self._stop = url, messages, at_once, list(stop)
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=_RETRIES, timeout=_TIMEOUT_S)
        self.model = self._find(model)

    def respond(self, requests: Sequence[Request], samples: int, on_reply: Callable[[int, Reply], None]) -> None:
        """Implement `Responder.respond`. Raises UserError for a request that the server refuses or that fails after 8 retries."""
        replies: queue.SimpleQueue[tuple[int, Reply | BaseException]] = queue.SimpleQueue()

        def send(position: int) -> None:
            try:
                replies.put((position, self._send(requests[position])))
            except BaseException as error:
                replies.put((position, error))

        pool = ThreadPoolExecutor(self._at_once)
        try:
            for position in range(len(requests)):
                pool.submit(send, position)
            for _ in requests:
                position, reply = replies.get()
                if isinstance(reply, BaseException):
                    raise reply
                on_reply(position, reply)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _send(self, request: Request) -> Reply:
        import openai

        asked = self._messages[request.prompt_ids]
        options: dict[str, Any] = {
            "model": self.model,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "max_tokens": request.max_tokens,
            "stop": self._stop or None,
        }
        try:
            if isinstance(asked, str):
                answer = self._client.completions.create(prompt=asked, **options)
                text = answer.choices[0].text
            else:
                messages = cast("list[ChatCompletionMessageParam]", asked)  # a role may be any text; the server decides
                answer = self._client.chat.completions.create(messages=messages, **options)
                text = _text(answer.choices[0].message)
        except openai.OpenAIError as error:
            raise UserError(f"{self._url} did not answer {request.id}: {one_line(error)}; correct the request, or the server") from error
        if answer.usage is None:
            raise UserError(f"{self._url} does not report token counts (usage), which lengths are taken from; use a server that does")
        return Reply(text, None, answer.usage.completion_tokens, _finish(answer.choices[0].finish_reason, self._url, request))

    def _find(self, model: str) -> str:
        import openai

        try:
            served = [entry.id for entry in self._client.with_options(max_retries=1, timeout=30).models.list()]
        except openai.OpenAIError as error:
            raise UserError(f"{self._url} does not list its models ({one_line(error)}); name a server's base URL, such as …/v1") from error
        if model and model not in served:
            raise UserError(f"{self._url} serves {', '.join(served) or 'no model'}, not {model}; correct --model")
        if not model and len(served) != 1:
            raise UserError(f"{self._url} serves {len(served)} models ({', '.join(served)}); choose one with --model")
        return model or served[0]


def _text(message: "ChatCompletionMessage") -> str:
    """Return the response as the model wrote it: servers that split off the reasoning send it in a separate field."""
    reasoning = getattr(message, "reasoning", None) or getattr(message, "reasoning_content", None)
    content = message.content or ""
    return f"<think>{reasoning}</think>{content}" if reasoning else content


def _finish(reason: str, url: str, request: Request) -> str:
    if reason not in ("stop", "length"):
        raise UserError(f"{url} ended {request.id} with finish_reason {reason!r}, expected stop or length; use a server that gives these")
    return reason
