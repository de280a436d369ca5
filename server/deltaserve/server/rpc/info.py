"""ServerService: what is served, and how full it is."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc.aio

from deltaserve.v1 import server_pb2 as pb
from deltaserve.v1 import server_pb2_grpc

if TYPE_CHECKING:
    from deltaserve.server.engine.engine import Engine

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class ServerService(server_pb2_grpc.ServerServiceServicer):
    """Reads; changes nothing. chat: the tokenizer has a chat template."""

    def __init__(self, engine: Engine, *, chat: bool) -> None:
        self._engine = engine
        self._chat = chat

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
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
            memory=pb.MemoryPlan(
                weights_bytes=info.weights_bytes,
                kv_cache_bytes=info.kv_cache_bytes,
                adapter_budget_bytes=info.adapter_budget_bytes,
            ),
            load=pb.Load(
                running_requests=stats.running,
                waiting_requests=stats.waiting,
                kv_blocks_total=stats.kv_blocks_total,
                kv_blocks_used=stats.kv_blocks_used,
                kv_block_size=stats.kv_block_size,
                adapter_bytes=max(stats.adapter_bytes_host, stats.adapter_bytes_device),
            ),
        )
