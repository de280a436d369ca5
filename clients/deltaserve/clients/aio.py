"""AsyncClient: the server's services for asyncio; the twin of `client.Client`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deltaserve.clients import answers, errors, requests, statistics, types
from deltaserve.clients.channel import (
    CHANNEL_OPTIONS,
    POLL_SECONDS,
    AsyncStreamBearer,
    AsyncUnaryBearer,
    tls,
)
from deltaserve.clients.errors import typed as _typed
from deltaserve.clients.identity_calls import AsyncIdentityCalls
from deltaserve.clients.requests import Adapters, LoadOptions, Options, Prompt
from deltaserve.clients.route_calls import AsyncRouteCalls
from deltaserve.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    identity_pb2_grpc,
    route_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)


class AsyncClient(AsyncRouteCalls, AsyncIdentityCalls):
    """A connection to one server, for one event loop. Every method raises
    `errors.DeltaserveError`.

    address: ``host:port``. token: an API key. ca, certificate, key: PEM files for TLS, as `tls`
    takes them; or credentials; none of these means plain text. timeout: seconds for each call that
    gives none of its own; None waits for ever (the server has its own limit).
    """

    def __init__(
        self,
        address: str,
        *,
        token: str = "",
        ca: Path | str | None = None,
        certificate: Path | str | None = None,
        key: Path | str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        timeout: float | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        options = (*CHANNEL_OPTIONS, *options)
        credentials = credentials or tls(ca, certificate, key)
        shown = [AsyncUnaryBearer(token), AsyncStreamBearer(token)] if token else []
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options, interceptors=shown)
        else:
            self._channel = grpc.aio.secure_channel(
                address, credentials, options, interceptors=shown
            )
        self.address = address
        self._timeout = timeout
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._adapters = adapter_pb2_grpc.AdapterServiceStub(self._channel)
        self._routes = route_pb2_grpc.RouteServiceStub(self._channel)
        self._identity = identity_pb2_grpc.IdentityServiceStub(self._channel)
        self._server = server_pb2_grpc.ServerServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what still runs and close the connection."""
        await self._channel.close()

    async def generate(
        self,
        prompt: Prompt | None,
        model: str = "",
        adapters: Adapters | None = None,
        max_tokens: int = 64,
        temperature: float = 0.0,
        logprobs: bool | int = False,
        ignore_eos: bool = False,
        **options: Unpack[Options],
    ) -> types.Generation:
        """Continue a prompt. model: an adapter, or the base if empty. adapters: several at once
        instead. logprobs: True for those of the chosen tokens, k for the k best ones as well.
        prompt: None if every member of a combination has one of its own."""
        request = requests.generate(
            generation_pb2.GenerateRequest,
            prompt,
            model,
            adapters,
            max_tokens,
            temperature,
            logprobs,
            ignore_eos,
            options,
        )
        with _typed():
            response = await self._generation.Generate(
                request, timeout=options.get("timeout", self._timeout)
            )
        return answers.generation(response, logprobs is not False)

    def stream(
        self,
        prompt: Prompt | None,
        model: str = "",
        adapters: Adapters | None = None,
        max_tokens: int = 64,
        temperature: float = 0.0,
        logprobs: bool | int = False,
        ignore_eos: bool = False,
        **options: Unpack[Options],
    ) -> AsyncIterator[types.Piece]:
        """As `generate`, piece by piece. Leaving the loop cancels the request."""
        request = requests.generate(
            generation_pb2.GenerateStreamRequest,
            prompt,
            model,
            adapters,
            max_tokens,
            temperature,
            logprobs,
            ignore_eos,
            options,
        )
        call = self._generation.GenerateStream(
            request, timeout=options.get("timeout", self._timeout)
        )
        return self._pieces(call, logprobs is not False)

    async def _pieces(self, call: Any, with_logprobs: bool) -> AsyncIterator[types.Piece]:
        try:
            with _typed():
                async for message in call:
                    for piece in answers.pieces(message, with_logprobs):
                        yield piece
        finally:
            call.cancel()

    async def score(
        self,
        prompt: Prompt | None,
        continuations: Sequence[str | Sequence[int]],
        model: str = "",
        adapters: Adapters | None = None,
        *,
        timeout: float | None = None,
        **fields: Any,
    ) -> list[types.ContinuationScore]:
        """Log-probabilities of each continuation. fields: user, priority, cache_salt,
        request_id, combination, max_wait_seconds."""
        request = requests.score(prompt, continuations, model, adapters, fields)
        with _typed():
            return answers.scores(
                await self._generation.Score(request, timeout=timeout or self._timeout)
            )

    async def set_weights(
        self, request_id: str, weights: Sequence[float], *, timeout: float | None = None
    ) -> None:
        """Change the weights of a combination that runs and is `live`, from its next token on."""
        request = requests.set_weights(request_id, weights)
        with _typed():
            await self._generation.SetWeights(request, timeout=timeout or self._timeout)

    async def tokenize(
        self, prompt: Prompt, model: str = "", *, timeout: float | None = None
    ) -> list[int]:
        """The token ids that `generate` would see, special tokens included. model: an adapter,
        which may bring its own tokenizer."""
        with _typed():
            response = await self._generation.Tokenize(
                requests.tokenize(prompt, model), timeout=timeout or self._timeout
            )
        return list(response.token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], model: str = "", *, timeout: float | None = None
    ) -> str:
        """The text of token ids, special tokens included."""
        with _typed():
            response = await self._generation.Detokenize(
                requests.detokenize(token_ids, model), timeout=timeout or self._timeout
            )
        return response.text

    async def load_adapter(
        self,
        name: str,
        uri: str,
        pinned: bool = False,
        *,
        wait: bool = True,
        register_only: bool = False,
        shared: bool = False,
        timeout: float | None = None,
        **options: Unpack[LoadOptions],
    ) -> types.Adapter:
        """Register and load a folder of the server. wait: until it is in memory. register_only:
        it is read and checked, and loaded when a request first asks for it. shared: every tenant
        may use it."""
        request = requests.load(name, uri, pinned, wait, register_only, shared, options)
        with _typed():
            response = await self._adapters.LoadAdapter(request, timeout=timeout or self._timeout)
        return answers.adapter(response.adapter)

    async def unload_adapter(self, name: str, *, timeout: float | None = None) -> int:
        """Wait for its requests, free it; the bytes freed."""
        request = adapter_pb2.UnloadAdapterRequest(name=name)
        with _typed():
            response = await self._adapters.UnloadAdapter(request, timeout=timeout or self._timeout)
        return response.freed_bytes

    async def get_adapter(self, name: str, *, timeout: float | None = None) -> types.Adapter:
        """One adapter as it is now."""
        request = adapter_pb2.GetAdapterRequest(name=name)
        with _typed():
            response = await self._adapters.GetAdapter(request, timeout=timeout or self._timeout)
        return answers.adapter(response.adapter)

    async def list_adapters(self, *, timeout: float | None = None) -> list[types.Adapter]:
        """All adapters, ordered by name."""
        found: list[types.Adapter] = []
        request = adapter_pb2.ListAdaptersRequest()
        with _typed():
            while True:
                page = await self._adapters.ListAdapters(request, timeout=timeout or self._timeout)
                found.extend(answers.adapter(a) for a in page.adapters)
                if not page.next_page_token:
                    return found
                request.page_token = page.next_page_token

    async def watch_adapters(
        self, *, timeout: float | None = None
    ) -> AsyncIterator[types.AdapterChange]:
        """All adapters, then every change, until the loop is left or the timeout passes."""
        call = self._adapters.WatchAdapters(adapter_pb2.WatchAdaptersRequest(), timeout=timeout)
        try:
            with _typed():
                async for message in call:
                    yield answers.change(message)
        finally:
            call.cancel()

    async def pin_adapter(
        self, name: str, pinned: bool = True, *, timeout: float | None = None
    ) -> types.Adapter:
        """Keep an adapter in memory, or let it be evicted again."""
        request = adapter_pb2.PinAdapterRequest(name=name, pinned=pinned)
        with _typed():
            response = await self._adapters.PinAdapter(request, timeout=timeout or self._timeout)
        return answers.adapter(response.adapter)

    async def server_info(self, *, timeout: float | None = None) -> types.ServerInfo:
        """The server as it is now."""
        with _typed():
            response = await self._server.GetServerInfo(
                server_pb2.GetServerInfoRequest(), timeout=timeout or self._timeout
            )
        return answers.server_info(response)

    async def stats(self, *, timeout: float | None = None) -> statistics.Stats:
        """What the server did in the last minute, and does now."""
        with _typed():
            response = await self._server.GetStats(
                server_pb2.GetStatsRequest(), timeout=timeout or self._timeout
            )
        return statistics.stats(response)

    async def ready(self, *, timeout: float | None = None) -> bool:
        """Whether the server takes requests now."""
        stub = health_pb2_grpc.HealthStub(self._channel)
        with _typed():
            response = await stub.Check(
                health_pb2.HealthCheckRequest(), timeout=timeout or self._timeout
            )
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    async def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until the server takes requests; Unavailable if it does not within the time."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while True:
            try:
                if await self.ready(timeout=max(end - loop.time(), POLL_SECONDS)):
                    return
                reason = "it says that it is not serving"
            except (errors.Unavailable, errors.DeadlineExceeded) as error:
                reason = error.message
            if loop.time() >= end:
                raise errors.Unavailable(
                    f"{self.address} was not ready after {timeout:g} s: {reason}",
                    grpc.StatusCode.UNAVAILABLE,
                )
            await asyncio.sleep(POLL_SECONDS)
