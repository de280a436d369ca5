"""ServerService: what is served, and how full it is."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from deltaserve.server.service.call import Call
from deltaserve.v1 import server_pb2 as pb

if TYPE_CHECKING:
    from deltaserve.server.engine.engine import Engine
    from deltaserve.server.engine.plan import MemoryPlan


class ServerService:
    """Reads; changes nothing. chat: the tokenizer has a chat template."""

    def __init__(self, engine: Engine, *, chat: bool) -> None:
        self._engine = engine
        self._chat = chat

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, call: Call
    ) -> pb.GetServerInfoResponse:
        info, stats = self._engine.info(), self._engine.stats()
        return pb.GetServerInfoResponse(
            version=version("deltaserve"),
            base=pb.BaseModel(
                name=info.base,
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
            load=pb.Load(
                running_requests=stats.running,
                waiting_requests=stats.waiting,
                kv_blocks_total=stats.kv_blocks_total,
                kv_blocks_used=stats.kv_blocks_used,
                kv_block_size=stats.kv_block_size,
                adapter_bytes=stats.adapter_bytes,
                kv_bytes=stats.kv_bytes,
                kv_blocks_idle=stats.kv_blocks_idle,
            ),
        )


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
