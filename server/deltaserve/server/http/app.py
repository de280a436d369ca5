"""The application: every path over HTTP."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from deltaserve.server.config import RpcConfig
from deltaserve.server.http import errors
from deltaserve.server.http.connect import Connect
from deltaserve.server.http.console import Console
from deltaserve.server.http.gate import Counted, Gate
from deltaserve.server.http.generate import Generate
from deltaserve.server.http.models import Models
from deltaserve.server.http.probes import Probes
from deltaserve.server.http.tokens import Tokens
from deltaserve.server.identity.doorman import Doorman
from deltaserve.server.metrics import Metrics
from deltaserve.server.service.services import Services


def application(
    services: Services, doorman: Doorman, config: RpcConfig, metrics: Metrics
) -> ASGIApp:
    """Other pages are added here: a router whose calls go through the gate."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    gate = Gate(services.traffic, doorman, config.host)
    for part in (
        Generate(services, gate, config),
        Models(services, gate, config),
        Tokens(services, gate, config),
        Probes(gate, metrics),
        Connect(services, gate, config, metrics),
    ):
        app.include_router(part.router)
    if config.console:
        app.include_router(Console().router)
    app.add_exception_handler(HTTPException, _no_such_thing)
    app.add_middleware(Counted, traffic=services.traffic, metrics=metrics)
    return app


async def _no_such_thing(request: Request, error: Any) -> Response:
    """A path that there is not, or not with this method."""
    where = f"{request.method} {request.url.path[:256]!r}"
    return errors.plain(error.status_code, f"{where}: {error.detail}", error.headers)
