"""/v1/models, and adapters in and out in the shape of vLLM."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from deltaserve.server.config import RpcConfig
from deltaserve.server.errors import AdapterUnknown
from deltaserve.server.http import body
from deltaserve.server.http.asked import from_json
from deltaserve.server.http.fields import LoadFields, UnloadFields
from deltaserve.server.http.gate import Gate
from deltaserve.server.http.names import in_client_names
from deltaserve.server.http.refused import refuse
from deltaserve.server.service.call import Call
from deltaserve.server.service.services import Services
from deltaserve.v1 import adapter_pb2 as pb
from deltaserve.v1 import route_pb2

_SERVED = (
    pb.ADAPTER_STATE_REGISTERED,
    pb.ADAPTER_STATE_LOADING,
    pb.ADAPTER_STATE_READY,
)
OWNER = "deltaserve"


class Models:
    """The base, adapters, and what else a request may name as its model."""

    def __init__(self, services: Services, gate: Gate, config: RpcConfig) -> None:
        methods = services.by_path()
        self._list = methods["deltaserve.v1.AdapterService/ListAdapters"]
        self._routes = methods["deltaserve.v1.RouteService/ListRoutes"]
        self._load = methods["deltaserve.v1.AdapterService/LoadAdapter"]
        self._unload = methods["deltaserve.v1.AdapterService/UnloadAdapter"]
        self._info = services.info
        self._gate = gate
        self._most = config.max_message_bytes
        self._started = int(time.time())
        self.router = APIRouter()
        self.router.add_api_route("/v1/models", self.all, methods=["GET"])
        self.router.add_api_route("/v1/models/{name:path}", self.one, methods=["GET"])
        self.router.add_api_route("/v1/load_lora_adapter", self.load, methods=["POST"])
        self.router.add_api_route("/v1/unload_lora_adapter", self.unload, methods=["POST"])

    async def all(self, request: Request) -> Response:
        call = self._gate.enter(request, self._list.role)
        return JSONResponse({"object": "list", "data": await self._models(call)})

    async def one(self, request: Request, name: str) -> Response:
        call = self._gate.enter(request, self._list.role)
        for model in await self._models(call):
            if model["id"] == name:
                return JSONResponse(model)
        raise AdapterUnknown(f"no model named {name[:128]!r} is served", field="model")

    async def load(self, request: Request) -> Response:
        call = self._gate.enter(request, self._load.role)
        given = await body.fields(request, LoadFields, self._most)
        if given.load_inplace:
            right = "false: unload the adapter first; requests that run keep what they began with"
            refuse("load_inplace", "true", right)
        message = pb.LoadAdapterRequest(
            name=given.lora_name,
            uri=given.lora_path,
            pinned=bool(given.pinned),
            register_only=bool(given.register_only),
        )
        if given.options is not None:
            from_json("options", given.options, message.options)
        with in_client_names():
            await self._load.run(message, call)
        return PlainTextResponse(f"Success: LoRA adapter '{given.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        call = self._gate.enter(request, self._unload.role)
        given = await body.fields(request, UnloadFields, self._most)
        with in_client_names():
            await self._unload.run(pb.UnloadAdapterRequest(name=given.lora_name), call)
        return PlainTextResponse(f"Success: LoRA adapter '{given.lora_name}' removed successfully.")

    async def _models(self, call: Call) -> list[dict[str, Any]]:
        base, folder = self._info.base, self._info.folder
        found = [self._model("base", n, folder, None, self._started) for n in self._info.names]
        routes: route_pb2.ListRoutesResponse = await self._routes.run(
            route_pb2.ListRoutesRequest(), call
        )
        for route in routes.routes:
            created = route.start_time.seconds or self._started
            found.append(self._model("route", route.name, folder, base, created))
        request = pb.ListAdaptersRequest()
        while True:
            page: pb.ListAdaptersResponse = await self._list.run(request, call)
            for adapter in page.adapters:
                if adapter.state in _SERVED and not adapter.patch:
                    created = adapter.loaded_time.seconds or self._started
                    parent = adapter.parent or base
                    made = self._model("adapter", adapter.name, adapter.uri, parent, created)
                    found.append(made)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def _model(
        self, kind: str, name: str, root: str, parent: str | None, created: int
    ) -> dict[str, Any]:
        """kind: our own field."""
        return {
            "id": name,
            "object": "model",
            "kind": kind,
            "created": created,
            "owned_by": OWNER,
            "root": root,
            "parent": parent,
            "max_model_len": self._info.max_length,
            "permission": [],
        }
