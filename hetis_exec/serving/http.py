"""An HTTP server with the API of OpenAI: completions and chats, whole or streamed."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from hetis_exec.errors import ExecutorError
from hetis_exec.serving.engine import BusyError, ServingEngine
from hetis_exec.serving.metrics import exposition
from hetis_exec.serving.protocol import Answer, ApiError, Ask, parse_ask, parse_body
from hetis_exec.serving.streams import Piece
from hetis_sim.spec.errors import SpecError


class Api:
    """Answers the requests of clients.

    Args:
        name: of the model, as clients call it.
        body_bytes: size of a request at most.
        key: what clients must send as their bearer token; empty for none.
    """

    def __init__(self, engine: ServingEngine, name: str, body_bytes: int, key: str = "") -> None:
        self._engine = engine
        self._name = name
        self._body_bytes = body_bytes
        self._key = key
        self._created = int(time.time())

    def app(self) -> FastAPI:
        """The application that a server runs."""
        app = FastAPI(title="hetis_exec", docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/v1/completions", self.completions, methods=["POST"], response_model=None)
        app.add_api_route("/v1/chat/completions", self.chats, methods=["POST"], response_model=None)
        app.add_api_route("/v1/models", self.models, methods=["GET"], response_model=None)
        app.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        app.add_api_route("/metrics", self.metrics, methods=["GET"], response_model=None)
        app.add_exception_handler(ApiError, _refuse)
        return app

    # -- what clients ask ------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        """A text that goes on."""
        return await self._generate(request, chat=False)

    async def chats(self, request: Request) -> Response:
        """The next message of a conversation."""
        return await self._generate(request, chat=True)

    async def models(self, request: Request) -> Response:
        """The one model there is."""
        self._check_key(request)
        model = {"id": self._name, "object": "model", "created": self._created, "owned_by": "hetis_exec",
                 "max_model_len": self._engine.longest_context}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        """Whether requests are served."""
        if self._engine.alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": f"ended: {self._engine.error}"}, status_code=503)

    async def metrics(self, request: Request) -> Response:
        """Figures for a monitor."""
        return PlainTextResponse(exposition(self._engine))

    def _check_key(self, request: Request) -> None:
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._key and not hmac.compare_digest(sent.encode(), self._key.encode()):
            raise ApiError(401, "the request has no valid bearer token")

    async def _body(self, request: Request) -> bytes:
        """The body, if it is of a size that is taken.

        Forms, which pages of other sites may send unasked, are not.
        """
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"content-type {kind or 'missing'}: must be application/json")
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self._body_bytes:
                raise ApiError(413, f"the body has more than {self._body_bytes} bytes")
            parts.append(part)
        return b"".join(parts)

    # -- texts -----------------------------------------------------------------------------------

    async def _generate(self, request: Request, chat: bool) -> Response:
        self._check_key(request)
        body = parse_body(await self._body(request))
        model = body.get("model")
        if model not in (None, self._name):
            raise ApiError(404, f"model={model!r}: this server has {self._name!r}", "model")
        encode = self._engine.encode_chat if chat else self._engine.encode
        # Tokenizing a long prompt takes a while, in which others are to be served.
        ask = await asyncio.to_thread(parse_ask, body, chat, encode)
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        request_id = self._start(ask, pieces)
        answer = Answer(ask, self._name)
        if ask.stream:
            return StreamingResponse(self._stream(answer, pieces, request_id), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-cache"})
        return await self._whole(request, answer, pieces, request_id)

    def _start(self, ask: Ask, pieces: asyncio.Queue[Piece]) -> int:
        loop = asyncio.get_running_loop()

        def put(piece: Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        try:
            return self._engine.start(ask.tokens, ask.params, put)
        except SpecError as error:
            raise ApiError(400, str(error), error.key) from None
        except BusyError as error:
            raise ApiError(429, str(error)) from None
        except ExecutorError as error:
            raise ApiError(503, str(error)) from None

    async def _whole(self, request: Request, answer: Answer, pieces: asyncio.Queue[Piece],
                     request_id: int) -> Response:
        parts: list[str] = []
        ended = False
        leaving = asyncio.create_task(_gone(request))
        try:
            while not ended:
                coming = asyncio.create_task(pieces.get())
                await asyncio.wait((coming, leaving), return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    return Response(status_code=499)
                piece = coming.result()
                parts.append(piece.text)
                answer.completion_tokens += len(piece.tokens)
                ended = piece.finish_reason is not None
            if piece.finish_reason == "error":
                raise ApiError(500, piece.error)
            return JSONResponse(answer.whole("".join(parts), piece.finish_reason or ""))
        finally:
            leaving.cancel()
            if not ended:
                self._engine.abort(request_id)

    async def _stream(self, answer: Answer, pieces: asyncio.Queue[Piece],
                      request_id: int) -> AsyncIterator[str]:
        """Server-sent events; a client that goes away before the end has its request given up."""
        ended = False
        try:
            for event in filter(None, [answer.opening()]):
                yield _event(event)
            while not ended:
                piece = await pieces.get()
                ended = piece.finish_reason is not None
                answer.completion_tokens += len(piece.tokens)
                if piece.finish_reason == "error":
                    yield _event(ApiError(500, piece.error).body)
                elif piece.text or ended:
                    yield _event(answer.piece(piece.text, piece.finish_reason))
            for event in filter(None, [answer.closing()]):
                yield _event(event)
            yield "data: [DONE]\n\n"
        finally:
            if not ended:
                self._engine.abort(request_id)


async def _gone(request: Request) -> None:
    """Return when the client of a request that has been read has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body, status_code=error.status, headers=headers)
