"""Clients of a deltaserve server; they need neither torch nor the server's code."""

from deltaserve.clients.aio import AsyncClient
from deltaserve.clients.client import Client
from deltaserve.clients.errors import DeltaserveError
from deltaserve.clients.types import Adapter, Generation, Piece, ServerInfo

__all__ = [
    "Adapter",
    "AsyncClient",
    "Client",
    "DeltaserveError",
    "Generation",
    "Piece",
    "ServerInfo",
]
