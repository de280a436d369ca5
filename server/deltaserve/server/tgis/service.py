"""TGIS's GenerationService: its requests as requests to our own, its answers from theirs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from deltaserve.server.service.call import Call
from deltaserve.server.service.convert import prompt_text, refuse
from deltaserve.server.service.encode import Encoder, Encoders
from deltaserve.server.service.generation import GenerationService
from deltaserve.server.service.methods import Method, methods
from deltaserve.server.service.services import Services
from deltaserve.server.tgis import requests
from deltaserve.server.tgis.answers import Answer, whole
from deltaserve.tgis import generation_pb2 as tgis
from deltaserve.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from deltaserve.server.engine.stats import EngineInfo


class TgisService:
    """Text in, text out, as clients of TGIS and vllm-tgis-adapter know it."""

    def __init__(self, generation: GenerationService, encoders: Encoders, info: EngineInfo) -> None:
        self._generation = generation
        self._encoders = encoders
        self._info = info

    async def Generate(
        self, request: tgis.BatchedGenerationRequest, call: Call
    ) -> tgis.BatchedGenerationResponse:
        """All of the batch, or the first thing that is wrong with one of them."""
        texts = [r.text for r in request.requests]
        if len(texts) > requests.MAX_BATCH:
            refuse("requests", f"{len(texts)} of them", f"at most {requests.MAX_BATCH}")
        model, name = requests.adapter(request), call.correlation_id

        async def one(i: int) -> tgis.GenerationResponse:
            mine, field = f"{name}-{i}" if name else "", f"requests[{i}].text"
            pieces = self._answer(request.params, model, texts[i], field, mine, call)
            async with aclosing(pieces):
                return whole([piece async for piece in pieces])

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(i)) for i in range(len(texts))]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return tgis.BatchedGenerationResponse(responses=[task.result() for task in tasks])

    async def GenerateStream(
        self, request: tgis.SingleGenerationRequest, call: Call
    ) -> AsyncGenerator[tgis.GenerationResponse, None]:
        """First what is told of the prompt, then piece by piece."""
        model, text = requests.adapter(request), request.request.text
        pieces = self._answer(
            request.params, model, text, "request.text", call.correlation_id, call
        )
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def Tokenize(
        self, request: tgis.BatchedTokenizeRequest, call: Call
    ) -> tgis.BatchedTokenizeResponse:
        """The tokens that Generate would see."""
        if len(request.requests) > requests.MAX_BATCH:
            found = f"{len(request.requests)} of them"
            refuse("requests", found, f"at most {requests.MAX_BATCH}")
        with requests.named_by_tgis("requests"):
            encoder = await self._encoder(requests.adapter(request))
        return tgis.BatchedTokenizeResponse(
            responses=[
                await self._tokenized(encoder, request, i) for i in range(len(request.requests))
            ]
        )

    async def ModelInfo(self, request: tgis.ModelInfoRequest, call: Call) -> tgis.ModelInfoResponse:
        """An answer may be as long as the model takes, less one token of a prompt."""
        return tgis.ModelInfoResponse(
            model_kind=tgis.ModelInfoResponse.DECODER_ONLY,
            max_sequence_length=self._info.max_length,
            max_new_tokens=self._info.max_length - 1,
        )

    async def _answer(
        self,
        params: tgis.Parameters,
        model: str,
        text: str,
        field: str,
        request_id: str,
        call: Call,
    ) -> AsyncGenerator[tgis.GenerationResponse, None]:
        """field: what the text is called in the request."""
        now = asyncio.get_running_loop().time()
        with requests.named_by_tgis(field):
            asked = requests.wanted(params)
            ends = None if asked.seconds is None else now + asked.seconds
            encoder = await self._encoder(model)
            ids, _ = await _truncated(encoder, text, field, params.truncate_input_tokens)
            answer = Answer(asked, text, ids, encoder.tokenizer.tokens, self._info.eos_token_ids)
            message = requests.generate(params, asked, model, ids, request_id)
            started = False
            async with aclosing(self._generation.GenerateStream(message, call)) as pieces:
                while (piece := await _next(pieces, ends)) is not None:
                    if not started:
                        started = True
                        yield answer.prompt(piece.start)
                    yield answer.piece(piece)
                    if piece.finishes:
                        return
            if not started:
                yield answer.prompt(None)
            yield answer.too_late()

    async def _encoder(self, model: str) -> Encoder:
        return await self._encoders.of([model] if model else [], known=True)

    async def _tokenized(
        self, encoder: Encoder, request: tgis.BatchedTokenizeRequest, i: int
    ) -> tgis.TokenizeResponse:
        text, field = request.requests[i].text, f"requests[{i}].text"
        ids, kept = await _truncated(encoder, text, field, request.truncate_input_tokens)
        found = tgis.TokenizeResponse(token_count=len(ids))
        if request.return_tokens:
            found.tokens.extend(encoder.tokenizer.tokens(ids))
        if request.return_offsets:
            offsets = await encoder.offsets(text)
            for start, end in (offsets[at] for at in kept):
                found.offsets.add(start=start, end=end)
        return found


def served(services: Services) -> dict[str, list[Method]]:
    """As `Services.methods`."""
    described = tgis.DESCRIPTOR.services_by_name["GenerationService"]
    service = TgisService(services.generation, services.encoders, services.info)
    return {described.full_name: list(methods(described, service))}


async def _next(
    pieces: AsyncGenerator[pb.GenerateStreamResponse, None], ends: float | None
) -> pb.GenerateStreamResponse | None:
    """None when the time is over. ends: by the event loop's clock. To give up waiting takes the
    request from the engine."""
    try:
        async with asyncio.timeout_at(ends):
            return await anext(pieces)
    except TimeoutError:
        return None


async def _truncated(
    encoder: Encoder, text: str, field: str, most: int
) -> tuple[list[int], list[int]]:
    """The token ids of a text, and where each was before. most: more are left out at the beginning,
    behind the special tokens there; 0 for all."""
    ids = await encoder.text(prompt_text(text, field))
    places = list(range(len(ids)))
    if 0 < most < len(ids):
        begin, end = encoder.specials(ids)
        rest = most - begin - end
        if rest < 1:
            right = (
                f"at least {begin + end + 1}: the tokenizer adds {begin + end} tokens of its own"
            )
            refuse("truncate_input_tokens", str(most), right)
        places = [*places[:begin], *places[len(ids) - end - rest :]]
    return [ids[at] for at in places], places
