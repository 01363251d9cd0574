"""One connection to a server: how its calls are made, and how its streams are released."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, Final, TypeAlias

import grpc

from concertina.client.channel import Access
from concertina.client.errors import ConcertinaError
from concertina.client.resuming import Release, StreamRequest
from concertina.client.statuses import status_error, told_by
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import session_service_pb2 as session_pb
from concertina.v1.generation_service_pb2_grpc import GenerationServiceStub
from concertina.v1.model_service_pb2_grpc import ModelServiceStub
from concertina.v1.session_service_pb2_grpc import SessionServiceStub

Channel: TypeAlias = grpc.Channel | grpc.aio.Channel

_RELEASE_S: Final = 2.0
_RELEASE_THREADS: Final = 4


class Stubs:
    """The services of a server. address: is named in errors."""

    def __init__(self, address: str, access: Access, channel: Channel) -> None:
        self.address = address
        self.generation = access.calls(GenerationServiceStub(channel))
        self.models = access.calls(ModelServiceStub(channel))
        self.sessions = access.calls(SessionServiceStub(channel))

    def stream(self, request: StreamRequest, timeout: float | None) -> Any:
        """Makes the call that this request is for; its responses are the events of a stream."""
        match request:
            case pb.GenerateRequest():
                return self.generation.Generate(request, timeout=timeout)
            case pb.ResumeRequest():
                return self.generation.Resume(request, timeout=timeout)
        return self.sessions.Continue(request, timeout=timeout)

    def release_call(self, request: Release) -> Any:
        """Makes the call that lets the server drop a stream that nobody reads any more."""
        pause = isinstance(request, session_pb.PauseRequest)
        method = self.sessions.Pause if pause else self.sessions.Delete
        return method(request, timeout=_RELEASE_S)

    def error(self, error: grpc.RpcError) -> ConcertinaError:
        """The error of a call that ended with a status other than OK."""
        told = told_by(error.trailing_metadata())
        return status_error(self.address, error.code(), error.details() or "", told)


class Connection(Stubs):
    """A connection for blocking code. Threads may share it."""

    def __init__(self, address: str, access: Access) -> None:
        self._channel = access.channel(address)
        super().__init__(address, access, self._channel)
        self._background = ThreadPoolExecutor(_RELEASE_THREADS, "concertina-release")
        self._releases: set[Future[Any]] = set()

    def release(self, request: Release) -> None:
        """Releases a stream in the background; a call that fails is ignored."""
        release = self._background.submit(self.release_call, request)
        self._releases.add(release)
        release.add_done_callback(self._releases.discard)

    def close(self) -> None:
        """Closes the connection after the releases in progress; open streams are cancelled."""
        wait(set(self._releases), _RELEASE_S)
        self._channel.close()
        self._background.shutdown(wait=False, cancel_futures=True)


class AsyncConnection(Stubs):
    """A connection for asyncio code."""

    def __init__(self, address: str, access: Access) -> None:
        self._channel = access.async_channel(address)
        super().__init__(address, access, self._channel)
        self._releases: set[asyncio.Task[None]] = set()

    def release(self, request: Release) -> None:
        """Releases a stream in the background; a call that fails is ignored."""
        release = asyncio.get_running_loop().create_task(self._release(request))
        self._releases.add(release)
        release.add_done_callback(self._releases.discard)

    async def _release(self, request: Release) -> None:
        with suppress(grpc.aio.AioRpcError):
            await self.release_call(request)

    async def close(self) -> None:
        """Closes the connection after the releases in progress; open streams are cancelled."""
        if self._releases:
            await asyncio.wait(set(self._releases), timeout=_RELEASE_S)
        await self._channel.close()
