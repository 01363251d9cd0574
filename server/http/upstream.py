"""The gRPC server behind the gateway: connections for each key, and what is known of its models."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from starlette.requests import Request

from concertina.client import AsyncClient, InvalidRequest, Model
from concertina.client.channel import Access, channel_options
from server.http.errors import HttpError
from server.http.settings import GatewaySettings
from server.http.writing.vocabulary import Vocabulary, vocabulary_of

_STREAMS_PER_CONNECTION: Final = 32  # a reader that stalls holds up no more than these
most_connections = 256  # beyond these, idle ones are closed
_MODEL_SECONDS: Final = 5.0
_MOST_VOCABULARIES: Final = 16
_MOST_MODELS: Final = 1024
_HEALTH_SECONDS: Final = 5.0
CALL_SECONDS: Final = 60.0
"""How long a call may take that generates nothing."""


@dataclass(eq=False)
class _Connection:
    key: str
    client: AsyncClient
    calls: int = 0


@dataclass(eq=False)
class Upstream:
    """The server behind a gateway. It belongs to one event loop.

    A key that the server does not know costs a connection until others need the room.
    """

    settings: GatewaySettings
    _connections: list[_Connection] = field(default_factory=list)
    _vocabularies: dict[str, Vocabulary] = field(default_factory=dict)
    _models: dict[tuple[str, str], tuple[float, Model]] = field(default_factory=dict)
    _health: grpc.aio.Channel | None = None

    @contextmanager
    def calling(self, request: Request) -> Iterator[AsyncClient]:
        """A client with the key of an HTTP request, for one call. Raises HttpError."""
        key = key_of(request)
        mine = [each for each in self._connections if each.key == key]
        if sum(each.calls for each in mine) >= self.settings.streams_per_key:
            raise HttpError(
                429,
                f"{self.settings.streams_per_key} calls with this key are open, the limit: "
                "wait until one ends",
                code="rate_limit_exceeded",
                retry_after=1.0,
            )
        least = min(mine, key=lambda each: each.calls, default=None)
        if least is None or least.calls >= _STREAMS_PER_CONNECTION:
            least = self._open(key)
        least.calls += 1
        try:
            yield least.client
        finally:
            least.calls -= 1

    def _open(self, key: str) -> _Connection:
        settings = self.settings
        try:
            client = AsyncClient(settings.upstream, key=key, tls=settings.upstream_tls)
        except InvalidRequest as error:
            raise HttpError(401, str(error), code="invalid_api_key") from None
        opened = _Connection(key, client)
        self._connections.append(opened)
        return opened

    async def tidy(self) -> None:
        """Close the connections that have been idle for longest, when there are too many."""
        idle = [each for each in self._connections if not each.calls]
        for each in idle[: max(0, len(self._connections) - most_connections)]:
            self._connections.remove(each)
            await each.client.close()

    async def model(self, client: AsyncClient, name: str) -> Model:
        """What is known of a model, at most a few seconds old; without a name, of the only one."""
        owner = next((each.key for each in self._connections if each.client is client), "")
        at, known = self._models.get((owner, name), (-_MODEL_SECONDS, None))
        if known is not None and time.monotonic() - at < _MODEL_SECONDS:
            return known
        found = await client.model(name, timeout=CALL_SECONDS)
        if len(self._models) >= _MOST_MODELS:
            self._models.clear()
        self._models[owner, name] = time.monotonic(), found
        return found

    async def vocabulary(self, client: AsyncClient, model: str, fingerprint: str) -> Vocabulary:
        """The tokens of a model, of which the caller has tokens."""
        known = self._vocabularies.get(fingerprint)
        if known is None:
            size = (await self.model(client, model)).vocabulary
            known = await vocabulary_of(client, model, size)
            while len(self._vocabularies) >= _MOST_VOCABULARIES:
                del self._vocabularies[next(iter(self._vocabularies))]
            self._vocabularies[fingerprint] = known
        return known

    async def is_serving(self) -> bool:
        """Whether the server says that it is well."""
        if self._health is None:
            self._health = _channel(self.settings)
        stub: Any = health_pb2_grpc.HealthStub(self._health)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_SECONDS)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Close all connections; open streams are cancelled."""
        for each in self._connections:
            await each.client.close()
        self._connections.clear()
        if self._health is not None:
            await self._health.close()


@asynccontextmanager
async def connected(settings: GatewaySettings) -> AsyncIterator[Upstream]:
    """The server behind a gateway, until the context ends."""
    upstream = Upstream(settings)
    try:
        yield upstream
    finally:
        await upstream.close()


def _channel(settings: GatewaySettings) -> grpc.aio.Channel:
    channel_options(settings.upstream)
    return Access("", settings.upstream_tls).async_channel(settings.upstream)


def key_of(request: Request) -> str:
    """The API key of a request; empty without one. Raises HttpError.

    lm_eval sends `Bearer` without a key when it has none.
    """
    given = request.headers.get("authorization", "")
    if not given:
        return ""
    scheme, _, key = given.partition(" ")
    if scheme.lower() != "bearer":
        raise HttpError(
            401,
            "Authorization is not understood: send `Authorization: Bearer KEY`",
            code="invalid_api_key",
        )
    return key.strip()
