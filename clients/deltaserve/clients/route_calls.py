"""What both clients can do with routes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from deltaserve.clients import report_messages, route_messages
from deltaserve.clients.errors import typed
from deltaserve.clients.report_types import Erased, FeedbackTarget, Report
from deltaserve.clients.route_types import Route, RouteArm, RouteOptions
from deltaserve.v1 import route_pb2 as pb


class RouteCalls:
    """Of the blocking client."""

    _routes: Any
    _timeout: float | None

    def put_route(
        self,
        name: str,
        arms: Sequence[RouteArm],
        *,
        timeout: float | None = None,
        **options: Unpack[RouteOptions],
    ) -> Route:
        """Make a route, or change it; `Aborted` if it is not that of `etag` any more."""
        request = route_messages.put(name, arms, options)
        with typed():
            response = self._routes.PutRoute(request, timeout=timeout or self._timeout)
        return route_messages.route(response.route)

    def get_route(self, name: str, *, timeout: float | None = None) -> Route:
        """One route as it is now."""
        request = pb.GetRouteRequest(name=name)
        with typed():
            response = self._routes.GetRoute(request, timeout=timeout or self._timeout)
        return route_messages.route(response.route)

    def list_routes(self, *, timeout: float | None = None) -> list[Route]:
        """All routes, ordered by name."""
        with typed():
            response = self._routes.ListRoutes(
                pb.ListRoutesRequest(), timeout=timeout or self._timeout
            )
        return [route_messages.route(route) for route in response.routes]

    def delete_route(self, name: str, *, timeout: float | None = None) -> None:
        """Take a route away; what was recorded of it stays."""
        request = pb.DeleteRouteRequest(name=name)
        with typed():
            self._routes.DeleteRoute(request, timeout=timeout or self._timeout)

    def roll_back_route(
        self, name: str, reason: str = "", *, timeout: float | None = None
    ) -> Route:
        """Give all of a route's requests to its control, at once."""
        request = pb.RollBackRouteRequest(name=name, reason=reason)
        with typed():
            response = self._routes.RollBackRoute(request, timeout=timeout or self._timeout)
        return route_messages.route(response.route)

    def record_feedback(
        self,
        request_id: str = "",
        reward: float | None = None,
        labels: Mapping[str, str] | None = None,
        *,
        feedback_id: str = "",
        route: str = "",
        user: str = "",
        timeout: float | None = None,
    ) -> FeedbackTarget:
        """Say how good an answer was, or how a `user` of `route` fared. It is durable when this
        returns. `NotFound` for an answer that is not known, `FailedPrecondition` for a user whom
        the route has not answered."""
        request = report_messages.feedback(request_id, reward, labels, feedback_id, route, user)
        with typed():
            response = self._routes.RecordFeedback(request, timeout=timeout or self._timeout)
        return report_messages.target(response)

    def get_report(
        self,
        route: str,
        *,
        level: float | None = None,
        cuped: bool = False,
        points: int = 0,
        tuned_for: int | None = None,
        timeout: float | None = None,
    ) -> Report:
        """Compare the arms of a route. level: chance of a wrong finding. points: moments of its
        history."""
        request = report_messages.ask(route, level, cuped, points, tuned_for)
        with typed():
            response = self._routes.GetReport(request, timeout=timeout or self._timeout)
        return report_messages.report(response)

    def erase_user(
        self, user: str, tenant: str | None = None, *, timeout: float | None = None
    ) -> Erased:
        """Forget what came of a user's requests on all routes, and what was said of them. It is
        durable when this returns. tenant: whose user it is; the key's own if left out."""
        request = pb.EraseUserRequest(user=user, tenant=tenant)
        with typed():
            response = self._routes.EraseUser(request, timeout=timeout or self._timeout)
        return Erased(response.counts, response.requests, response.feedback)


class AsyncRouteCalls:
    """Of the asynchronous client; the twin of `RouteCalls`."""

    _routes: Any
    _timeout: float | None

    async def put_route(
        self,
        name: str,
        arms: Sequence[RouteArm],
        *,
        timeout: float | None = None,
        **options: Unpack[RouteOptions],
    ) -> Route:
        """Make a route, or change it; `Aborted` if it is not that of `etag` any more."""
        request = route_messages.put(name, arms, options)
        with typed():
            response = await self._routes.PutRoute(request, timeout=timeout or self._timeout)
        return route_messages.route(response.route)

    async def get_route(self, name: str, *, timeout: float | None = None) -> Route:
        """One route as it is now."""
        request = pb.GetRouteRequest(name=name)
        with typed():
            response = await self._routes.GetRoute(request, timeout=timeout or self._timeout)
        return route_messages.route(response.route)

    async def list_routes(self, *, timeout: float | None = None) -> list[Route]:
        """All routes, ordered by name."""
        with typed():
            response = await self._routes.ListRoutes(
                pb.ListRoutesRequest(), timeout=timeout or self._timeout
            )
        return [route_messages.route(route) for route in response.routes]

    async def delete_route(self, name: str, *, timeout: float | None = None) -> None:
        """Take a route away; what was recorded of it stays."""
        request = pb.DeleteRouteRequest(name=name)
        with typed():
            await self._routes.DeleteRoute(request, timeout=timeout or self._timeout)

    async def roll_back_route(
        self, name: str, reason: str = "", *, timeout: float | None = None
    ) -> Route:
        """Give all of a route's requests to its control, at once."""
        request = pb.RollBackRouteRequest(name=name, reason=reason)
        with typed():
            response = await self._routes.RollBackRoute(request, timeout=timeout or self._timeout)
        return route_messages.route(response.route)

    async def record_feedback(
        self,
        request_id: str = "",
        reward: float | None = None,
        labels: Mapping[str, str] | None = None,
        *,
        feedback_id: str = "",
        route: str = "",
        user: str = "",
        timeout: float | None = None,
    ) -> FeedbackTarget:
        """Say how good an answer was, or how a `user` of `route` fared. It is durable when this
        returns. `NotFound` for an answer that is not known, `FailedPrecondition` for a user whom
        the route has not answered."""
        request = report_messages.feedback(request_id, reward, labels, feedback_id, route, user)
        with typed():
            response = await self._routes.RecordFeedback(request, timeout=timeout or self._timeout)
        return report_messages.target(response)

    async def get_report(
        self,
        route: str,
        *,
        level: float | None = None,
        cuped: bool = False,
        points: int = 0,
        tuned_for: int | None = None,
        timeout: float | None = None,
    ) -> Report:
        """Compare the arms of a route. level: chance of a wrong finding. points: moments of its
        history."""
        request = report_messages.ask(route, level, cuped, points, tuned_for)
        with typed():
            response = await self._routes.GetReport(request, timeout=timeout or self._timeout)
        return report_messages.report(response)

    async def erase_user(
        self, user: str, tenant: str | None = None, *, timeout: float | None = None
    ) -> Erased:
        """Forget what came of a user's requests on all routes, and what was said of them. It is
        durable when this returns. tenant: whose user it is; the key's own if left out."""
        request = pb.EraseUserRequest(user=user, tenant=tenant)
        with typed():
            response = await self._routes.EraseUser(request, timeout=timeout or self._timeout)
        return Erased(response.counts, response.requests, response.feedback)
