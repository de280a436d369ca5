"""RouteService: routes, feedback on their answers, and reports."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from deltaserve.server.engine import validate
from deltaserve.server.engine.core import Request
from deltaserve.server.errors import InvalidRequest
from deltaserve.server.identity.sight import Sight
from deltaserve.server.ledger.ledger import Ledger
from deltaserve.server.metrics import Metrics
from deltaserve.server.routes.book import RouteBook
from deltaserve.server.routes.route import Standing, State
from deltaserve.server.routes.seen import check_owned
from deltaserve.server.routes.seen import unknown as no_route
from deltaserve.server.routes.whole import Whole
from deltaserve.server.service import convert
from deltaserve.server.service.call import Call
from deltaserve.server.service.caveats import caveats
from deltaserve.server.service.feedback import asked, feedback
from deltaserve.server.service.report import fill, ratio, see, stamp, totals
from deltaserve.server.state.records import Entry
from deltaserve.v1 import generation_pb2
from deltaserve.v1 import route_pb2 as pb

if TYPE_CHECKING:
    from deltaserve.server.engine.engine import Engine


log = logging.getLogger(__name__)

STATES: dict[State, Any] = {
    state: pb.RouteState.Value(f"ROUTE_STATE_{state.name}") for state in State
}


class RouteService:
    """book: of the routes. metrics: count by them. sight: who may see which adapter. ledger: what
    came of the routes' requests."""

    def __init__(
        self, engine: Engine, book: RouteBook, metrics: Metrics, sight: Sight, ledger: Ledger
    ) -> None:
        info = engine.info()
        self._limits = validate.Limits(info.vocab_size, info.max_length, 1 << 31)
        self._book = book
        self._metrics = metrics
        self._sight = sight
        self._ledger = ledger
        self._whole = Whole(None, repr)

    async def PutRoute(self, request: pb.PutRouteRequest, call: Call) -> pb.PutRouteResponse:
        for i, arm in enumerate(request.route.arms):
            self._check_overrides(f"route.arms[{i}].", arm)
            named = [("model", arm.model)]
            named += [(f"adapters[{j}].name", one.name) for j, one in enumerate(arm.adapters)]
            for field, name in named:
                self._sight.check(call.caller, name, f"route.arms[{i}].{field}")
        standing = await self._book.put(call.caller, request.route)
        return pb.PutRouteResponse(route=shown(standing))

    async def GetRoute(self, request: pb.GetRouteRequest, call: Call) -> pb.GetRouteResponse:
        if reason := self._book.failed(call.caller).get(request.name):
            return pb.GetRouteResponse(route=_failed(request.name, reason))
        return pb.GetRouteResponse(route=shown(self._book.get(request.name, call.caller)))

    async def ListRoutes(self, request: pb.ListRoutesRequest, call: Call) -> pb.ListRoutesResponse:
        found = [shown(standing) for standing in self._book.all(call.caller)]
        found += [_failed(name, why) for name, why in self._book.failed(call.caller).items()]
        found.sort(key=lambda route: route.name)
        return pb.ListRoutesResponse(routes=found)

    async def DeleteRoute(
        self, request: pb.DeleteRouteRequest, call: Call
    ) -> pb.DeleteRouteResponse:
        await self._book.delete(call.caller, request.name)
        self._metrics.on_route_gone(request.name)
        self._ledger.forget(request.name)
        return pb.DeleteRouteResponse()

    async def RollBackRoute(
        self, request: pb.RollBackRouteRequest, call: Call
    ) -> pb.RollBackRouteResponse:
        reason = convert.label("reason", request.reason)
        reason = reason or f"asked for by {call.caller.name}"
        standing = await self._book.roll_back(call.caller, request.name, reason)
        return pb.RollBackRouteResponse(route=shown(standing))

    async def RecordFeedback(
        self, request: pb.RecordFeedbackRequest, call: Call
    ) -> pb.RecordFeedbackResponse:
        given = feedback(request, call.caller.tenant)
        if given.route and not self._book.known(given.route, call.caller):
            raise no_route(given.route, "route")
        answer = await self._ledger.feedback(given)
        return pb.RecordFeedbackResponse(route=answer.route, arm=answer.arm)

    async def GetReport(self, request: pb.GetReportRequest, call: Call) -> pb.GetReportResponse:
        asked_for, name = asked(request), request.route
        standing = self._book.get(name, call.caller, "route")
        check_owned(call.caller, name, standing, "route")  # it tells of all tenants' users
        route, book = standing.route, self._ledger.book(name, standing.epoch)
        response = pb.GetReportResponse(
            route=shown(standing),
            start_time=stamp(standing.epoch / 1000),
            arms=totals(route, book),
        )
        crossed = 0
        if book is not None:
            response.sample_ratio.CopyFrom(ratio(book))
            seen = await see(book, asked_for.points, time.time())
            crossed = seen.crossed
            await asyncio.to_thread(fill, response, route, seen, asked_for)
        response.warnings.extend(caveats(response, standing, book, asked_for.cuped, crossed))
        return response

    async def EraseUser(self, request: pb.EraseUserRequest, call: Call) -> pb.EraseUserResponse:
        user = convert.label("user", request.user)
        if not user:
            convert.refuse("user", "''", "the `user` of requests")
        own = call.caller.tenant
        tenant = convert.label("tenant", request.tenant) if request.HasField("tenant") else own
        entry = Entry(call.caller.name, "EraseUser", tenant)
        erased = await self._whole.run(entry, self._ledger.erase(tenant, user, entry))
        log.info("a user of tenant %r was erased by %s: %s", tenant, call.caller.name, erased)
        return pb.EraseUserResponse(
            counts=len(erased.counts), requests=erased.requests, feedback=erased.feedback
        )

    def _check_overrides(self, path: str, arm: pb.Arm) -> None:
        """What would be refused of every request."""
        given = generation_pb2.GenerateRequest(sampling=arm.sampling, stop=arm.stop)
        try:
            convert.bad_words(given)
            sampling = convert.sampling(given)
            validate.check(Request("route", (0,), sampling), self._limits)
        except InvalidRequest as error:
            field = convert.in_request(error).field
            raise InvalidRequest(f"{path}{field}: {error}", field=path + field) from None


def shown(standing: Standing) -> pb.Route:
    """The message."""
    route = pb.Route()
    route.CopyFrom(standing.route.given)
    route.etag = standing.etag
    route.state = STATES[standing.state]
    route.reason = standing.reason
    route.weights.update(standing.shares(time.time()))
    route.start_time.CopyFrom(stamp(standing.epoch / 1000))
    route.update_time.CopyFrom(stamp(standing.changed))
    return route


def _failed(name: str, reason: str) -> pb.Route:
    return pb.Route(name=name, state=STATES[State.FAILED], reason=reason)
