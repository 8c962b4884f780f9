"""What clients of the OpenAI API send and get, as plain values."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from hetis_exec.language.params import GenerationParams
from hetis_exec.language.workload import listed
from hetis_sim.spec.errors import HetisError, SpecError, require

Body = Mapping[str, Any]

# Fields whose wish is not fulfilled here, and the values that wish for nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False, 0),
    "top_logprobs": (0,), "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,),
    "repetition_penalty": (1,), "min_p": (0,), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},), "use_beam_search": (False,)}

CLIENT_TEMPERATURE = 1.0
"""Of clients that do not name one, as the API has it."""


class ApiError(HetisError):
    """An answer that is no text: its HTTP status, and the field of the request that is to blame."""

    def __init__(self, status: int, message: str, field_name: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.field_name = field_name

    @property
    def body(self) -> dict[str, Any]:
        """What the client gets."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.field_name, "code": self.status}}


@dataclass(frozen=True)
class Ask:
    """A request of a client, checked.

    Attributes:
        tokens: the prompt.
        stream: whether the text is sent as it grows.
        usage: whether a stream ends with counts of tokens; ``counting`` has them in every chunk.
        chat: whether the answer is a message rather than a text.
    """

    tokens: list[int]
    params: GenerationParams
    stream: bool
    usage: bool
    counting: bool
    chat: bool


def parse_body(raw: bytes) -> Body:
    """The JSON object that a client has sent.

    Raises:
        ApiError: it is none.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    return body


def parse_ask(body: Body, chat: bool, encode: Callable[[Any], list[int]]) -> Ask:
    """A request for a text; ``encode`` gives the tokens of the prompt, or of the messages.

    Raises:
        ApiError: a field that is missing, or has a value that is not allowed.
    """
    try:
        for key, allowed in UNSUPPORTED.items():
            value = body.get(key)
            require(value is None or value in allowed, key, value,
                    f"{allowed[0]!r}: nothing else is supported")
        options = body.get("stream_options") or {}
        require(isinstance(options, dict), "stream_options", options, "an object")
        return Ask(encode(_messages(body) if chat else _prompt(body)), _params(body), _flag(body, "stream"),
                   _flag(options, "include_usage"), _flag(options, "continuous_usage_stats"), chat)
    except SpecError as error:
        raise ApiError(400, str(error), error.key) from None


def _params(body: Body) -> GenerationParams:
    most = body.get("max_completion_tokens")
    temperature = body.get("temperature")
    given = {key: body[key] for key in ("top_p", "top_k", "seed") if body.get(key) is not None}
    # Some clients say -1 where they want no limit.
    given["top_k"] = max(0, given["top_k"]) if isinstance(given.get("top_k"), int) else given.get("top_k", 0)
    return GenerationParams(
        max_tokens=body.get("max_tokens") if most is None else most,
        temperature=CLIENT_TEMPERATURE if temperature is None else temperature,
        stop=listed("stop", body.get("stop")),
        stop_token_ids=listed("stop_token_ids", body.get("stop_token_ids")),
        ignore_eos=_flag(body, "ignore_eos"), **given)


def _flag(body: Body, key: str) -> bool:
    value = body.get(key)
    require(value is None or isinstance(value, bool), key, value, "true or false")
    return bool(value)


def _prompt(body: Body) -> Any:
    """A text, or token ids; a list with one of them counts as it."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    tokens = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], str | list)
    require(isinstance(prompt, str) or tokens, "prompt", _kind(prompt), "one text, or one list of token ids")
    return prompt


def _messages(body: Body) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise SpecError("messages", _kind(messages), "a list of at least one message")
    return [_message(number, message) for number, message in enumerate(messages)]


def _message(number: int, message: Any) -> dict[str, Any]:
    """A message whose content is one text; parts of text are joined."""
    where = f"messages[{number}]"
    require(isinstance(message, dict) and isinstance(message.get("role"), str), where, _kind(message),
            "an object with role and content")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
                 for part in content]
        require(all(isinstance(part, str) for part in parts), f"{where}.content", "other parts",
                "parts of type text")
        content = "\n".join(str(part) for part in parts)
    require(isinstance(content, str), f"{where}.content", _kind(content), "a text")
    return {**message, "content": content}


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


# -- answers ---------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """Makes the answers to one request, whole or in chunks.

    Attributes:
        completion_tokens: so far.
    """

    ask: Ask
    model: str
    completion_tokens: int = 0
    id: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, finish_reason: str) -> dict[str, Any]:
        """The answer to whoever waits for all of it."""
        body: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.ask.chat else {
            "text": text, "logprobs": None}
        return {**self._head(chunk=False), "choices": [{"index": 0, **body, "finish_reason": finish_reason}],
                "usage": self.usage()}

    def opening(self) -> dict[str, Any] | None:
        """What a stream begins with, where it is a chat."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self.ask.chat else None

    def piece(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        """A part of a text."""
        delta: dict[str, Any] = {"content": text} if text or finish_reason is None else {}
        return self._chunk(delta if self.ask.chat else text, finish_reason)

    def closing(self) -> dict[str, Any] | None:
        """Counts at the end of a stream, for whoever wants them."""
        if not self.ask.usage:
            return None
        return {**self._head(chunk=True), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Counts of tokens."""
        prompt, made = len(self.ask.tokens), self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def _chunk(self, content: Any, finish_reason: str | None) -> dict[str, Any]:
        body = {"delta": content} if self.ask.chat else {"text": content, "logprobs": None}
        chunk = {**self._head(chunk=True), "choices": [{"index": 0, **body, "finish_reason": finish_reason}]}
        return {**chunk, "usage": self.usage()} if self.ask.counting else chunk

    def _head(self, chunk: bool) -> dict[str, Any]:
        name = "chat.completion" if self.ask.chat else "text_completion"
        prefix = "chatcmpl" if self.ask.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": f"{name}.chunk" if chunk and self.ask.chat else name,
                "created": self.created, "model": self.model}
