"""The console: a page in the browser, built from clients/console, served as the files it is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePosixPath

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

PATH = "/console"
_INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".md": "text/plain; charset=utf-8",
}

HEADERS = {
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types default",
        )
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # the names do not change from one version to the next: the browser asks each time
    "cache-control": "no-cache",
}
"""Names and answers are strangers' text: whatever they hold, no script of theirs runs."""


@dataclass(frozen=True, slots=True)
class Asset:
    """One file."""

    data: bytes
    kind: str
    etag: str


def assets() -> dict[str, Asset]:
    """By name; there are no others."""
    found = {}
    for file in (files("deltaserve.server.http") / "assets").iterdir():
        kind = _TYPES.get(PurePosixPath(file.name).suffix)
        if kind is not None:
            data = file.read_bytes()
            found[file.name] = Asset(data, kind, f'"{hashlib.sha256(data).hexdigest()[:32]}"')
    return found


class Console:
    """Everybody may have the page; what it asks for is asked with a key."""

    def __init__(self) -> None:
        self._assets = assets()
        self.router = APIRouter()
        for path in ("/", PATH):
            self.router.add_api_route(path, self._page, methods=["GET", "HEAD"])
        self.router.add_api_route(PATH + "/{name}", self._asset, methods=["GET", "HEAD"])
        self.router.add_api_route(PATH + "/", self._index, methods=["GET", "HEAD"])

    async def _page(self) -> Response:
        """Relative, as a proxy may have put us below another path."""
        return RedirectResponse("console/", 308, HEADERS)

    async def _index(self, request: Request) -> Response:
        return await self._asset(request, _INDEX)

    async def _asset(self, request: Request, name: str) -> Response:
        found = self._assets.get(name)
        if found is None:
            return Response("there is no such file\n", 404, HEADERS, "text/plain; charset=utf-8")
        headers = {**HEADERS, "etag": found.etag}
        if found.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(found.data, headers=headers, media_type=found.kind)
