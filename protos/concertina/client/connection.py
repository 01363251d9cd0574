"""One connection to a server: how its calls are begun, and how its streams are left."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, Final, TypeAlias

import grpc

from concertina.client.channel import Access
from concertina.client.errors import ConcertinaError, status_error
from concertina.client.resuming import Farewell, StreamRequest
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import session_service_pb2 as session_pb
from concertina.v1.generation_service_pb2_grpc import GenerationServiceStub
from concertina.v1.model_service_pb2_grpc import ModelServiceStub
from concertina.v1.session_service_pb2_grpc import SessionServiceStub

Channel: TypeAlias = grpc.Channel | grpc.aio.Channel

_FAREWELL_S: Final = 2.0
_FAREWELL_THREADS: Final = 4


class Stubs:
    """The services of a server. address: named in errors."""

    def __init__(self, address: str, access: Access, channel: Channel) -> None:
        self.address = address
        self.generation = access.keyed(GenerationServiceStub(channel))
        self.models = access.keyed(ModelServiceStub(channel))
        self.sessions = access.keyed(SessionServiceStub(channel))

    def stream(self, request: StreamRequest, timeout: float | None) -> Any:
        """Begins the call that this request is for; its responses are the events of a stream."""
        match request:
            case pb.GenerateRequest():
                return self.generation.Generate(request, timeout=timeout)
            case pb.ResumeRequest():
                return self.generation.Resume(request, timeout=timeout)
        return self.sessions.Continue(request, timeout=timeout)

    def farewell(self, request: Farewell) -> Any:
        """Begins the call that tells the server that nobody reads a stream any more."""
        pause = isinstance(request, session_pb.PauseRequest)
        method = self.sessions.Pause if pause else self.sessions.Delete
        return method(request, timeout=_FAREWELL_S)

    def error(self, error: grpc.RpcError) -> ConcertinaError:
        """What a call comes to that ended with a status."""
        return status_error(self.address, error.code(), error.details() or "")


class Connection(Stubs):
    """For blocking code; may be shared between threads."""

    def __init__(self, address: str, access: Access) -> None:
        self._channel = access.channel(address)
        super().__init__(address, access, self._channel)
        self._background = ThreadPoolExecutor(_FAREWELL_THREADS, "concertina-farewell")
        self._farewells: set[Future[Any]] = set()

    def leave(self, request: Farewell) -> None:
        """Tells the server in the background, as well as that goes, that a stream is left."""
        said = self._background.submit(self.farewell, request)
        self._farewells.add(said)
        said.add_done_callback(self._farewells.discard)

    def close(self) -> None:
        """Closes the connection once the farewells are said; open streams are cancelled."""
        wait(set(self._farewells), _FAREWELL_S)
        self._channel.close()
        self._background.shutdown(wait=False, cancel_futures=True)


class AsyncConnection(Stubs):
    """For asyncio code."""

    def __init__(self, address: str, access: Access) -> None:
        self._channel = access.async_channel(address)
        super().__init__(address, access, self._channel)
        self._farewells: set[asyncio.Task[None]] = set()

    def leave(self, request: Farewell) -> None:
        """Tells the server in the background, as well as that goes, that a stream is left."""
        said = asyncio.get_running_loop().create_task(self._say(request))
        self._farewells.add(said)
        said.add_done_callback(self._farewells.discard)

    async def _say(self, request: Farewell) -> None:
        with suppress(grpc.aio.AioRpcError):
            await self.farewell(request)

    async def close(self) -> None:
        """Closes the connection once the farewells are said; open streams are cancelled."""
        if self._farewells:
            await asyncio.wait(set(self._farewells), timeout=_FAREWELL_S)
        await self._channel.close()
