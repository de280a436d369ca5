"""/health, /ping, /version, /metrics: what machines ask."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

from fastapi import APIRouter
from prometheus_client import exposition
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deltaserve.server.http.gate import Gate
from deltaserve.server.identity.caller import Role
from deltaserve.server.metrics import Metrics

READ = ["GET", "HEAD"]


class Probes:
    """Health and version are for everybody who reaches the port; metrics name adapters, and are
    not."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics
        self.router = APIRouter()
        for path in ("/health", "/ping"):
            self.router.add_api_route(path, self.health, methods=READ)
        self.router.add_api_route("/version", self.version, methods=READ)
        self.router.add_api_route("/metrics", self.metrics, methods=READ)

    async def health(self) -> Response:
        """200 while requests are taken, 503 while the server drains."""
        return Response(status_code=503 if self._gate.draining else 200)

    async def version(self) -> Response:
        return JSONResponse({"version": version("deltaserve")})

    async def metrics(self, request: Request) -> Response:
        self._gate.identify(request, Role.ADMIN)
        encode, kind = exposition.choose_encoder(request.headers.get("accept", ""))
        text = await asyncio.to_thread(encode, self._metrics.registry)
        return Response(text, headers={"content-type": kind})
