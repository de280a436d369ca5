"""/v1/completions and /v1/chat/completions."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeAlias

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deltaserve.server.config import RpcConfig
from deltaserve.server.engine.stats import EngineInfo
from deltaserve.server.http import answers, asked, body, errors
from deltaserve.server.http.asked import Asked
from deltaserve.server.http.events import DONE, EventStream, event, merged
from deltaserve.server.http.fields import ChatFields, CompletionFields, Sampled, StreamOptions
from deltaserve.server.http.gate import Gate, unless_gone
from deltaserve.server.http.logprobs import Shown
from deltaserve.server.http.names import in_client_names
from deltaserve.server.http.pieces import ChatPieces, Pieces, Told
from deltaserve.server.http.words import Numbers, Vocabularies
from deltaserve.server.service.call import Call
from deltaserve.server.service.methods import Method
from deltaserve.server.service.services import Services
from deltaserve.v1 import generation_pb2 as pb

REQUEST_ID = "x-request-id"
LARGE = 64 << 10
"""Bytes of responses, beyond which they are written on another thread."""


Numbered: TypeAlias = tuple[int, pb.GenerateStreamResponse]
"""With the number of the prompt that it continues."""


class Generate:
    """The two endpoints."""

    def __init__(self, services: Services, gate: Gate, config: RpcConfig) -> None:
        methods = services.by_path()
        self._whole: Method = methods["deltaserve.v1.GenerationService/Generate"]
        self._stream: Method = methods["deltaserve.v1.GenerationService/GenerateStream"]
        self._info: EngineInfo = services.info
        self._words = Vocabularies(services.encoders)
        self._gate = gate
        self._config = config
        self.router = APIRouter()
        self.router.add_api_route("/v1/completions", self.completions, methods=["POST"])
        self.router.add_api_route("/v1/chat/completions", self.chats, methods=["POST"])

    async def completions(self, request: Request) -> Response:
        call = self._gate.enter(request, self._whole.role)
        given = await body.fields(request, CompletionFields, self._config.max_message_bytes)
        wanted = asked.completion(given, _id("cmpl", given, request), self._info)
        return await self._answer(request, call, given, wanted)

    async def chats(self, request: Request) -> Response:
        call = self._gate.enter(request, self._whole.role)
        given = await body.fields(request, ChatFields, self._config.max_message_bytes)
        wanted = asked.chat(given, _id("chatcmpl", given, request), self._info)
        return await self._answer(request, call, given, wanted)

    async def _answer(
        self, request: Request, call: Call, given: Sampled, wanted: Asked
    ) -> Response:
        if given.stream:
            return await unless_gone(request, self._streamed(request, call, given, wanted))
        return await unless_gone(request, self._at_once(call, given, wanted))

    async def _at_once(self, call: Call, given: Sampled, wanted: Asked) -> Response:
        with in_client_names(wanted.names):
            responses: list[pb.GenerateResponse] = await _together(
                [self._whole.run(message, call) for message in wanted.messages]
            )
        words = [await self._shown(given, response.served_by) for response in responses]

        def made() -> Response:
            told = wanted.id, wanted.model
            if isinstance(given, ChatFields):
                [whole], [shown] = responses, words
                answer = answers.chat(*told, whole, wanted.stops, shown, wanted.demanded)
            else:
                answer = answers.completion(*told, responses, wanted.stops, words)
            return JSONResponse(answer)

        large = sum(response.ByteSize() for response in responses) > LARGE
        return await asyncio.to_thread(made) if large else made()

    async def _streamed(
        self, request: Request, call: Call, given: Sampled, wanted: Asked
    ) -> Response:
        """The status is that of the first output: what is refused has one of its own."""
        messages = merged([self._stream.run(message, call) for message in wanted.messages])
        try:
            with in_client_names(wanted.names):
                first = await anext(messages)
        except BaseException:
            await messages.aclose()
            raise
        events = self._events(call, given, wanted, first, messages)
        return EventStream(request, events, messages, self._config.write_seconds)

    async def _events(
        self,
        call: Call,
        given: Sampled,
        wanted: Asked,
        first: Numbered,
        messages: AsyncGenerator[Numbered, None],
    ) -> AsyncGenerator[str | bytes, None]:
        options = given.stream_options or StreamOptions()
        form = ChatPieces if isinstance(given, ChatFields) else Pieces
        usage = Told.ALWAYS if options.continuous_usage_stats else Told.AT_END
        pieces = form(wanted, usage if options.include_usage else Told.NEVER)
        words: dict[int, Shown] = {}
        async with aclosing(messages):
            try:
                with in_client_names(wanted.names):
                    async for number, message in _with(first, messages):
                        self._gate.confirm(call)
                        if number not in words:
                            served = message.start.served_by
                            words[number] = await self._shown(given, served)
                        for chunk in pieces.of(number, message, words[number]):
                            yield event(chunk)
            except Exception as error:
                _, described, _ = errors.describe(error)
                yield event(described)
                return
        if (last := pieces.last()) is not None:
            yield event(last)
        yield DONE

    async def _shown(self, given: Sampled, served: pb.ServedBy) -> Shown:
        return Numbers() if given.return_tokens_as_token_ids else await self._words.of(served)


async def _together(
    work: list[Coroutine[Any, Any, pb.GenerateResponse]],
) -> list[pb.GenerateResponse]:
    """All results; the first failure ends all."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _with(
    first: Numbered, rest: AsyncGenerator[Numbered, None]
) -> AsyncGenerator[Numbered, None]:
    yield first
    async for found in rest:
        yield found


def _id(kind: str, given: Sampled, request: Request) -> str:
    """The client's name for the request, or one of ours."""
    named = given.request_id or request.headers.get(REQUEST_ID, "")
    return named or f"{kind}-{uuid.uuid4().hex}"
