"""ServerService: what is served, and how full it is."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from deltaserve.server.identity.sight import Sight
from deltaserve.server.recent import KEPT_SECONDS, Recent
from deltaserve.server.service import convert
from deltaserve.server.service.call import Call
from deltaserve.server.service.statistics import load, statistics
from deltaserve.v1 import server_pb2 as pb

if TYPE_CHECKING:
    from deltaserve.server.engine.engine import Engine
    from deltaserve.server.engine.plan import MemoryPlan


class ServerService:
    """Reads; changes nothing. recent: as the engine's observer was told. sight: who may know of
    which adapters. chat: the tokenizer has a chat template."""

    def __init__(self, engine: Engine, recent: Recent, sight: Sight, *, chat: bool) -> None:
        self._engine = engine
        self._recent = recent
        self._sight = sight
        self._chat = chat

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, call: Call
    ) -> pb.GetServerInfoResponse:
        info = self._engine.info()
        return pb.GetServerInfoResponse(
            version=version("deltaserve"),
            base=pb.BaseModel(
                name=info.base,
                names=info.names,
                architecture=info.architecture,
                fingerprint=info.fingerprint,
                held_fingerprint=info.held_fingerprint,
                quantization=info.quantization,
                dtype=info.dtype,
                max_length=info.max_length,
                vocab_size=info.vocab_size,
                chat=self._chat,
            ),
            device=info.device,
            adapter_formats=info.formats,
            memory=_memory(info.memory),
            load=load(self._engine.stats()),
        )

    async def GetStats(self, request: pb.GetStatsRequest, call: Call) -> pb.GetStatsResponse:
        asked = request.history_seconds
        if asked > KEPT_SECONDS:
            convert.refuse("history_seconds", str(asked), f"at most {KEPT_SECONDS}")
        sees = partial(self._sight.sees, call.caller)
        return statistics(self._recent, self._engine.stats(), asked, sees)


def _memory(plan: MemoryPlan) -> pb.MemoryPlan:
    return pb.MemoryPlan(
        weights_bytes=plan.weights,
        kv_cache_bytes=plan.kv_most,
        adapter_budget_bytes=plan.adapter_most,
        budget_bytes=plan.budget,
        free_bytes=plan.free,
        step_bytes=plan.step,
        kv_token_bytes=plan.shape.token,
        kv_floor_bytes=plan.kv_floor,
        kv_tokens=plan.kv_tokens,
        adapters=[
            pb.AdapterFit(kind=f.kind, bytes=f.nbytes, count=f.count, kv_tokens=f.kv_tokens)
            for f in plan.fits
        ],
    )
