"""Gate: what every call over HTTP passes through. It counts, asks who calls, refuses while the
server drains, and turns whatever is raised into an error of OpenAI's shape."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Coroutine
from contextlib import ExitStack
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltaserve.server.errors import Cancelled, Forbidden
from deltaserve.server.http import errors
from deltaserve.server.identity.caller import Credentials, Role
from deltaserve.server.identity.doorman import Doorman
from deltaserve.server.identity.exposure import loopback
from deltaserve.server.metrics import Metrics
from deltaserve.server.service.call import Call
from deltaserve.server.service.traffic import Traffic

T = TypeVar("T")

UNKNOWN = "_unknown"
"""In metrics, the path of requests to paths that there are not."""
BEARER = "bearer "


class Gate:
    """Asks of each request who it is from, and whether it can be taken. host: where the server
    listens."""

    def __init__(self, traffic: Traffic, doorman: Doorman, host: str) -> None:
        self._traffic = traffic
        self._doorman = doorman
        self._local = loopback(host)

    def enter(self, request: Request, role: Role) -> Call:
        """Who calls, if the call can be taken."""
        self._traffic.check()
        return self.identify(request, role)

    def identify(self, request: Request, role: Role) -> Call:
        """Who calls, whether or not the server drains."""
        caller = self._doorman.admit(credentials(request), role)
        if self._local and not caller.key:
            _check_host(request.headers.get("host", ""))
        return Call(caller)

    def confirm(self, call: Call) -> None:
        """For what goes on: Unauthenticated once the caller's key is valid no more."""
        self._doorman.confirm(call.caller)

    @property
    def draining(self) -> bool:
        """No new calls are taken."""
        return self._traffic.draining


class Counted:
    """ASGI middleware: counts requests from their arrival to their last byte. One that has not
    arrived wholly when the server begins to drain is refused as a new one is: a client that sends
    no more would hold the shutdown up."""

    def __init__(self, app: ASGIApp, traffic: Traffic, metrics: Metrics) -> None:
        self._app = app
        self._traffic = traffic
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        whole = False

        async def arriving() -> Message:
            nonlocal whole
            if whole:
                return await receive()
            message = await self._traffic.unless_draining(receive())
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        with ExitStack() as held:
            held.enter_context(self._traffic.running())
            scope["state"]["held"] = held
            try:
                await self._app(scope, arriving, watched)
            except Exception as error:
                if status:
                    raise
                await errors.response(error)(scope, receive, watched)
            finally:
                route = getattr(scope.get("route"), "path", UNKNOWN)
                self._metrics.on_http(route, status or 499)


def endless(request: Request) -> None:
    """A shutdown does not wait for the answer to this request."""
    held: ExitStack = request.scope["state"]["held"]
    held.close()


def _check_host(given: str) -> None:
    """A web page may have a name of its own point to this machine (DNS rebinding): its browser then
    calls us by that name."""
    try:
        name = urlsplit(f"//{given}").hostname or ""
        if name != "localhost":
            ipaddress.ip_address(name)
    except ValueError:
        raise Forbidden(
            f"host: {given[:64]!r} is not possible: a server without API keys that listens on the "
            "loopback is called by its address or as localhost"
        ) from None


def credentials(request: Request) -> Credentials:
    """What the client shows."""
    given = request.headers.get("authorization", "")
    token = given[len(BEARER) :].strip() if given.lower().startswith(BEARER) else ""
    connection = request.scope["state"].get("connection")
    peer = f"{request.client.host}:{request.client.port}" if request.client else ""
    return Credentials(peer, token, connection.subjects() if connection is not None else ())


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work, which is cancelled when the client goes away. The body of the request
    must have been read."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled("the client went away")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
