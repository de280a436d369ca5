"""Routed: one request on its way through a route, from its arm to its trial."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from deltaserve.server.engine.core import Output
from deltaserve.server.errors import (
    AdapterBusy,
    AdapterUnavailable,
    AdapterUnknown,
    Cancelled,
    InvalidRequest,
    Overloaded,
    QuotaExceeded,
    RouteUnavailable,
    ShuttingDown,
    SlowReader,
)
from deltaserve.server.ledger.trial import Ended, Trial
from deltaserve.server.routes.assign import Assignment, Placement
from deltaserve.server.routes.refusals import OPENING
from deltaserve.server.routes.route import Arm, Metric
from deltaserve.v1 import generation_pb2 as pb

ASSIGNMENTS: dict[Assignment, Any] = {
    kind: pb.Assignment.Value(f"ASSIGNMENT_{kind.name}") for kind in Assignment
}
Asked = TypeVar("Asked", pb.GenerateRequest, pb.GenerateStreamRequest, pb.ScoreRequest)

NOT_THE_ARMS = (InvalidRequest, Overloaded, QuotaExceeded, ShuttingDown)
"""What was asked for was turned away before an arm could do anything right or wrong."""
GONE = (Cancelled, SlowReader, asyncio.CancelledError, GeneratorExit)
MISSING = (AdapterUnknown, AdapterUnavailable, AdapterBusy)


@dataclass(slots=True)
class Heard:
    """Of one continuation."""

    opening: str = ""
    blank: bool = True
    tokens: int = 0

    def add(self, output: Output) -> None:
        if len(self.opening) < OPENING:
            self.opening = (self.opening + output.text)[:OPENING]
        self.blank = self.blank and not output.text.strip()
        self.tokens += len(output.token_ids)


@dataclass(slots=True)
class Measured:
    """What came of a request. outputs: as the engine gives them, in their order."""

    began: float = field(default_factory=time.monotonic)
    heard: dict[str, Heard] = field(default_factory=dict)
    prompts: list[int] = field(default_factory=list)
    completion_tokens: int = 0
    first_token: float = 0.0
    seconds: float = 0.0

    def add(self, outputs: Iterable[Output]) -> None:
        for output in outputs:
            self.heard.setdefault(output.request_id, Heard()).add(output)
            if output.usage is not None:
                self.prompts.append(output.usage.prompt_tokens)
                self.completion_tokens += output.usage.completion_tokens
            if output.timings is not None:
                self.first_token = max(self.first_token, output.timings.time_to_first_token)
                self.seconds = max(self.seconds, output.timings.total)

    def trial(
        self, name: str, placement: Placement, tenant: str, user: str, ended: Ended, spoken: bool
    ) -> Trial:
        """spoken: text was asked for, not scores."""
        standing, arm = placement.standing, placement.arm
        rails = standing.route.guardrails
        heard = self.heard.values()
        slow, first = rails.get(Metric.SLOW), rails.get(Metric.SLOW_FIRST_TOKEN)
        long = rails.get(Metric.LONG)
        longest = max((h.tokens for h in heard), default=0)
        answered = ended is Ended.ANSWERED
        counted = user if placement.assignment is Assignment.STICKY or arm.shadow else ""
        return Trial(
            request_id=name,
            route=standing.route.name,
            epoch=standing.epoch,
            arm=arm.name,
            tenant=tenant,
            user=counted,
            shadow=bool(arm.shadow),
            at=time.time(),
            ended=ended,
            first_token=self.first_token,
            seconds=self.seconds or time.monotonic() - self.began,
            prompt_tokens=(max(self.prompts, default=0) if spoken else sum(self.prompts)),
            completion_tokens=self.completion_tokens,
            empty=answered and spoken and any(h.blank for h in heard),
            slow=slow is not None and answered and self.seconds > slow.seconds,
            slow_first_token=first is not None and answered and self.first_token > first.seconds,
            long=long is not None and longest > long.tokens,
            longest=longest,
            weights=placement.weights,
        )


Finish = Callable[[Placement, Trial, list[str]], None]
"""Takes a trial and the openings of its texts."""


class Routed(Generic[Asked]):
    """request: as it is to be answered, its route's name replaced by the arm's adapters. placement:
    None where no route was named. finish: gets the trial when it has ended."""

    def __init__(
        self,
        request: Asked,
        placement: Placement | None = None,
        tenant: str = "",
        finish: Finish | None = None,
    ) -> None:
        self.request: Asked = request
        self.placement = placement
        self.measured = Measured()
        self._tenant = tenant
        self._finish = finish

    def heard(self, outputs: list[Output]) -> list[Output]:
        """The same."""
        if self.placement is not None:
            self.measured.add(outputs)
        return outputs

    def answered_by(self, ids: Iterable[str]) -> None:
        """Of more continuations than are answered, these are the answer."""
        chosen = set(ids)
        self.measured.heard = {k: h for k, h in self.measured.heard.items() if k in chosen}

    def mark(self, served: pb.ServedBy) -> pb.ServedBy:
        """The same, with the route."""
        if self.placement is not None:
            served.route = self.placement.standing.route.name
            served.arm = self.placement.arm.name
            served.assignment = ASSIGNMENTS[self.placement.assignment]
        return served

    @property
    def shown(self) -> str:
        """For the log."""
        p = self.placement
        if p is None:
            return "-"
        return f"{p.standing.route.name}/{p.arm.name}/{p.assignment.value}"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Until it is over, whatever ends it."""
        if self.placement is None:
            yield
            return
        ended = Ended.ERROR
        try:
            yield
            ended = Ended.ANSWERED
        except GONE:
            ended = Ended.CANCELLED
            raise
        except NOT_THE_ARMS:
            ended = Ended.REFUSED
            raise
        except MISSING as error:
            route, arm = self.placement.standing.route.name, self.placement.arm.name
            text = f"route {route!r}, arm {arm!r}: {error}"
            raise RouteUnavailable(text, field="model") from error
        finally:
            self.end(ended)

    def end(self, ended: Ended) -> None:
        """It is over: its trial goes to the ledger."""
        if self.placement is None or self._finish is None:
            return
        spoken = not isinstance(self.request, pb.ScoreRequest)
        trial = self.measured.trial(
            self.request.request_id,
            self.placement,
            self._tenant,
            self.request.user,
            ended,
            spoken,
        )
        openings = [h.opening for h in self.measured.heard.values()] if spoken else []
        self._finish(self.placement, trial, openings)


def as_arm(request: Asked, arm: Arm) -> Asked:
    """A copy that the arm answers: its adapters, and what it sets of sampling and stop."""
    made = type(request)()
    made.CopyFrom(request)
    made.model = arm.model
    del made.adapters[:]
    made.adapters.extend(arm.adapters)
    made.request_id = made.request_id or uuid.uuid4().hex
    if not isinstance(made, pb.ScoreRequest):
        _override(made.sampling, arm.sampling)
        _override(made.stop, arm.stop)
    return made


def _override(given: Any, by: Any) -> None:
    for name, _ in by.ListFields():
        given.ClearField(name.name)
    given.MergeFrom(by)
