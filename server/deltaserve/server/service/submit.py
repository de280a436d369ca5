"""Submission: requests into the engine within their tenant's quotas, and out of it whatever
happens."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from deltaserve.server.engine.core import Request
from deltaserve.server.errors import InvalidRequest
from deltaserve.server.identity.quotas import Quotas
from deltaserve.server.service import convert
from deltaserve.server.service.call import Call
from deltaserve.server.service.outbox import LoopOutbox, Stream

if TYPE_CHECKING:
    from deltaserve.server.engine.engine import Engine


class Submitter:
    """Belongs to one event loop, as its outbox does."""

    def __init__(self, engine: Engine, outbox: LoopOutbox, quotas: Quotas) -> None:
        self._engine = engine
        self._outbox = outbox
        self._quotas = quotas
        self._tenants: dict[str, str] = {}  # of the requests in flight, by their engine's ids

    def called(self, name: str, tenant: str) -> list[str]:
        """The engine's ids of the tenant's requests in flight that clients call so."""
        own = (i for i, whose in self._tenants.items() if whose == tenant)
        return [i for i in own if name_of(i) == name]

    @asynccontextmanager
    async def submitted(
        self, requests: Sequence[Request], call: Call, *, paid: bool = True
    ) -> AsyncIterator[Stream]:
        """What they give; at the end those that still run are cancelled. paid: out of the tenant's
        quotas. QuotaExceeded, and whatever the engine refuses them with."""
        stream = self._outbox.open([r.request_id for r in requests])
        self._tenants.update(dict.fromkeys(stream.ids, call.caller.tenant))
        prompts = sum(_prompt_tokens(r) for r in requests if not r.sibling)
        most = prompts + sum(r.sampling.max_tokens for r in requests)
        try:
            with self._quotas.admitted(call.caller.tenant if paid else "", most) as charge:
                for request in requests:
                    self._engine.submit(request, self._outbox)
                charge.used = prompts
                try:
                    yield stream
                finally:
                    charge.used += stream.tokens
        except InvalidRequest as error:
            raise convert.in_request(error) from None
        finally:
            for request_id in stream.unfinished:
                self._engine.cancel(request_id)
            self._outbox.close(stream)
            for request_id in stream.ids:
                del self._tenants[request_id]


def engine_id(name: str, index: int) -> str:
    """A client may repeat its names; the engine's ids are unique."""
    return f"{name}#{index}#{uuid.uuid4().hex[:8]}"


def name_of(engine_id: str) -> str:
    """What the client calls it."""
    return engine_id.rsplit("#", 2)[0]


def _prompt_tokens(request: Request) -> int:
    """As in its usage."""
    each = request.combination.members if request.combination is not None else ()
    own = [request.prompt_ids if m.prompt_ids is None else m.prompt_ids for m in each]
    return sum(map(len, own or [request.prompt_ids]))
