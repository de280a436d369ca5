"""What can be wrong with a request to the server. rpc/status.py gives each a gRPC code.

* RequestError
  x Unauthenticated          nobody that the server knows: no key, or one that is not valid
  x Forbidden                the caller is known, and may not do this
  x QuotaExceeded            the tenant has asked for more than it may
  x IdentityUnknown          no key or tenant of that name
  x IdentityConflict         keys or tenants that are there forbid it
  x InvalidRequest           a field of the request is wrong
  x AdapterUnknown           no adapter of that name or digest is registered
  x RequestUnknown           no request of that id runs that could be changed
  x AdapterConflict          the name is taken by other content
  x AdapterBusy              it is being loaded or unloaded; try again when that is done
  x AdapterTooLarge          it does not fit into the adapter memory
  x AdapterUnavailable       its load failed; the message says why
  x RouteUnknown             no route of that name
  x RouteUnavailable         its arm, or the route itself, cannot be served; the message says why
  x Changed                  somebody else changed it since it was read
  x NameTaken                a route and an adapter cannot have one name
  x NonFiniteLogits          the weights that were asked for give no numbers to choose by
  x Overloaded               the queue or a budget is full; try again later
  x Cancelled                the client went away
  x DeadlineExceeded         the request's deadline passed
  x SlowReader               the client does not read its stream
  x ShuttingDown             the server drains
  x StateUnavailable         what was asked for cannot be kept: the database does not take it
  x AnswerUnknown            no route gave an answer of that id that is still known
  x UserNotExposed           the route has answered none of the user's requests
  x EngineFailure            a bug or an exhausted machine; the details are in the log
"""

from __future__ import annotations


class RequestError(Exception):
    """Base of the tree. `field` is the request's field at fault, if there is one."""

    def __init__(self, message: str, *, field: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.retry_after = retry_after


class Unauthenticated(RequestError):
    """Nobody that the server knows: no key, or one that is not valid."""


class Forbidden(RequestError):
    """The caller is known, and may not do this."""


class QuotaExceeded(RequestError):
    """The tenant has asked for more than it may; `retry_after` is in seconds."""


class IdentityUnknown(RequestError):
    """No key or tenant of that name."""


class IdentityConflict(RequestError):
    """Keys or tenants that are there forbid it, or where they are kept."""


class InvalidRequest(RequestError):
    """A field of the request is wrong."""


class AdapterUnknown(RequestError):
    """No adapter of that name or digest is registered."""


class RequestUnknown(RequestError):
    """No request of that id runs that could be changed."""


class AdapterConflict(RequestError):
    """The name is taken by other content."""


class AdapterBusy(RequestError):
    """It is being loaded or unloaded; try again when that is done."""


class AdapterTooLarge(RequestError):
    """It does not fit into the adapter memory; the message has both sizes in bytes."""


class AdapterUnavailable(RequestError):
    """Its load failed; the message says why."""


class RouteUnknown(RequestError):
    """No route of that name."""


class RouteUnavailable(RequestError):
    """Its arm, or the route itself, cannot be served; the message says why."""


class Changed(RequestError):
    """Somebody else changed it since it was read."""


class NameTaken(RequestError):
    """A route and an adapter cannot have one name."""


class NonFiniteLogits(RequestError):
    """The weights that were asked for give no numbers to choose by."""


class Overloaded(RequestError):
    """The queue or a budget is full; `retry_after` is in seconds. reason: for the metrics."""

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        reason: str = "queue_full",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, field=field, retry_after=retry_after)
        self.reason = reason


class Cancelled(RequestError):
    """The client went away."""


class DeadlineExceeded(RequestError):
    """The request's deadline passed."""


class SlowReader(RequestError):
    """The client does not read its stream."""


class ShuttingDown(RequestError):
    """The server drains and takes no new work."""


class StateUnavailable(RequestError):
    """What was asked for cannot be kept: the database does not take it."""


class AnswerUnknown(RequestError):
    """No route gave an answer of that id, to this tenant, that is still known."""


class UserNotExposed(RequestError):
    """The route has answered none of the user's requests."""


class EngineFailure(RequestError):
    """A bug or an exhausted machine."""
