"""TGIS's GenerationService: its requests as requests to our own, its answers from theirs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from deltaserve.server.service.call import Call
from deltaserve.server.service.convert import prompt_text, refuse
from deltaserve.server.service.encode import Encoder
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

    def __init__(self, generation: GenerationService, info: EngineInfo) -> None:
        self._generation = generation
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
            count = f"{len(request.requests)} of them"
            refuse("requests", count, f"at most {requests.MAX_BATCH}")
        with requests.named_by_tgis("requests"):
            encoder = await self._generation.encoder(requests.adapter(request), call)
        found = tgis.BatchedTokenizeResponse()
        for i, one in enumerate(request.requests):
            with requests.named_by_tgis(f"requests[{i}].text"):
                ids = await encoder.text(prompt_text(one.text))
            kept = _kept(ids, encoder, request.truncate_input_tokens)
            answer = found.responses.add(token_count=len(kept))
            if request.return_tokens:
                answer.tokens.extend(encoder.tokenizer.tokens([ids[at] for at in kept]))
            if request.return_offsets:
                offsets = await encoder.offsets(one.text)
                for start, end in (offsets[at] for at in kept):
                    answer.offsets.add(start=start, end=end)
        return found

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
            encoder = await self._generation.encoder(model, call)
            ids = await encoder.text(prompt_text(text))
            ids = [ids[at] for at in _kept(ids, encoder, params.truncate_input_tokens)]
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


def served(services: Services) -> dict[str, list[Method]]:
    """As `Services.methods`."""
    described = tgis.DESCRIPTOR.services_by_name["GenerationService"]
    service = TgisService(services.generation, services.info)
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


def _kept(ids: list[int], encoder: Encoder, most: int) -> list[int]:
    """The places of the tokens to keep. most: of those of the text the first are left out; 0 for
    all."""
    places = list(range(len(ids)))
    if not 0 < most < len(ids):
        return places
    begin, end = encoder.specials(ids)
    rest, own = most - begin - end, begin + end
    if rest < 1:
        right = f"at least {own + 1}: the tokenizer adds {own} tokens of its own"
        refuse("truncate_input_tokens", str(most), right)
    return [*places[:begin], *places[len(ids) - end - rest :]]
