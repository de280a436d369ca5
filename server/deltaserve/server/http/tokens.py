"""/tokenize and /detokenize, in the shape of vLLM."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deltaserve.server.config import RpcConfig
from deltaserve.server.http import body, conversation, refused
from deltaserve.server.http.fields import TextFields, TokensFields
from deltaserve.server.http.gate import Gate
from deltaserve.server.http.names import in_client_names
from deltaserve.server.http.words import Vocabularies
from deltaserve.server.service.services import Services
from deltaserve.v1 import generation_pb2 as pb

_NAMES = {"token_ids": "tokens", "token_ids.ids": "tokens"}


class Tokens:
    """Texts to tokens and back, exactly as requests see them."""

    def __init__(self, services: Services, gate: Gate, config: RpcConfig) -> None:
        methods = services.by_path()
        self._tokenize = methods["deltaserve.v1.GenerationService/Tokenize"]
        self._detokenize = methods["deltaserve.v1.GenerationService/Detokenize"]
        self._base = services.info.names
        self._words = Vocabularies(services.encoders)
        self._gate = gate
        self._most = config.max_message_bytes
        self.router = APIRouter()
        self.router.add_api_route("/tokenize", self.tokenize, methods=["POST"])
        self.router.add_api_route("/detokenize", self.detokenize, methods=["POST"])

    async def tokenize(self, request: Request) -> Response:
        call = self._gate.enter(request, self._tokenize.role)
        given = await body.fields(request, TextFields, self._most)
        refused.check(given, template=given.prompt is None)
        message = pb.TokenizeRequest(model=given.model or "")
        if given.prompt is None:
            message.chat.CopyFrom(conversation.to_message(given))
        elif given.messages is None:
            message.text = given.prompt
        else:
            refused.refuse("messages", "a list beside a prompt", "left out, or the prompt")
        with in_client_names():
            found: pb.TokenizeResponse = await self._tokenize.run(message, call)
        ids = list(found.token_ids)
        made: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": found.max_length,
            "tokens": ids,
            "token_strs": None,
        }
        if given.return_token_strs:
            model = given.model if given.model and given.model not in self._base else ""
            served = pb.ServedBy(adapters=[pb.ServedAdapter(name=model)] if model else [])
            made["token_strs"] = list(map(await self._words.of(served), ids))
        return JSONResponse(made)

    async def detokenize(self, request: Request) -> Response:
        call = self._gate.enter(request, self._detokenize.role)
        given = await body.fields(request, TokensFields, self._most)
        message = pb.DetokenizeRequest(model=given.model or "", token_ids=given.tokens)
        with in_client_names(_NAMES):
            found: pb.DetokenizeResponse = await self._detokenize.run(message, call)
        return JSONResponse({"prompt": found.text})
