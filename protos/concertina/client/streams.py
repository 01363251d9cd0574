"""Streams of events, for blocking and for asyncio code, that resume when their calls break."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any, Self

import grpc

from concertina.client.completions import Collector, Completion
from concertina.client.connection import AsyncConnection, Connection
from concertina.client.events import Event
from concertina.client.resuming import CallBroken, Resumption
from concertina.client.statuses import told_by
from concertina.v1 import generation_service_pb2 as pb


class Stream:
    """The events of one stream, checked against the contract as they are read.

    A context manager: its end cancels a stream that still runs, and the server forgets the stream.
    After `cancel` the iteration ends without an error.
    """

    def __init__(self, connection: Connection, resumption: Resumption) -> None:
        self._connection = connection
        self._resumption = resumption
        self._cancelled = threading.Event()
        self._cancelling = threading.Lock()
        self._call: Any = connection.stream(*resumption.first_call())

    @property
    def resumed(self) -> int:
        """How many times the stream went on in another call."""
        return self._resumption.resumed

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        try:
            event = self._next()
        except Exception:
            self.cancel()
            raise
        if event is None:
            self.cancel()
            raise StopIteration
        return event

    def text(self) -> str:
        """Reads the rest of the stream and returns its text, of one output after the other."""
        return self._collected().text()

    def complete(self) -> Completion:
        """Reads the whole stream, of which nothing has been read, and puts it together."""
        return self._collected().completion()

    def _collected(self) -> Collector:
        collector = Collector()
        with self:
            for event in self:
                collector.take(event)
        return collector

    def _next(self) -> Event | None:
        while True:
            try:
                return self._read()
            except CallBroken as broken:
                wait_s = self._resumption.wait_s(broken)
            self._cancelled.wait(wait_s)
            self._call_again()

    def _read(self) -> Event | None:
        """The next event of the call; None if the stream is over or cancelled."""
        message, code, details, told = None, grpc.StatusCode.OK, "", None
        try:
            message = None if self._cancelled.is_set() else next(self._call, None)
        except grpc.RpcError:
            code, details = self._call.code(), self._call.details() or ""
            told = told_by(self._call.trailing_metadata())
        if self._cancelled.is_set():
            return None
        if message is None:
            self._resumption.end(code, details, told)
            return None
        return self._resumption.read(message)

    def _call_again(self) -> None:
        self._call.cancel()
        self._call = self._connection.stream(*self._resumption.next_call())
        if self._cancelled.is_set():  # `cancel` may have cancelled the old call
            self._call.cancel()

    def cancel(self) -> None:
        """Stops the stream. Any thread may call it, and more than once."""
        with self._cancelling:  # the reading thread returns after the release has begun
            release = None if self._cancelled.is_set() else self._resumption.release()
            self._cancelled.set()
            self._call.cancel()
            if release is not None:
                self._connection.release(release)

    def detach(self) -> None:
        """Stops reading, but not the stream: the server keeps it, and `resume` takes it up."""
        with self._cancelling:
            self._cancelled.set()
            self._call.cancel()

    close = cancel

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncStream:
    """The events of one stream, for `async for` and `async with`: what Stream does."""

    def __init__(self, connection: AsyncConnection, resumption: Resumption) -> None:
        self._connection = connection
        self._resumption = resumption
        self._cancelled = asyncio.Event()
        self._call: Any = connection.stream(*resumption.first_call())

    @property
    def resumed(self) -> int:
        """How many times the stream went on in another call."""
        return self._resumption.resumed

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        try:
            event = await self._next()
        except Exception:
            self.cancel()
            raise
        if event is None:
            self.cancel()
            raise StopAsyncIteration
        return event

    async def text(self) -> str:
        """Reads the rest of the stream and returns its text, of one output after the other."""
        return (await self._collected()).text()

    async def complete(self) -> Completion:
        """Reads the whole stream, of which nothing has been read, and puts it together."""
        return (await self._collected()).completion()

    async def _collected(self) -> Collector:
        collector = Collector()
        async with self:
            async for event in self:
                collector.take(event)
        return collector

    async def _next(self) -> Event | None:
        while True:
            try:
                return await self._read()
            except CallBroken as broken:
                wait_s = self._resumption.wait_s(broken)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._cancelled.wait()
            self._call_again()

    async def _read(self) -> Event | None:
        """The next event of the call; None if the stream is over or cancelled."""
        message, code, details, told = None, grpc.StatusCode.OK, "", None
        try:
            message = None if self._cancelled.is_set() else await self._call.read()
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details() or ""
            told = told_by(error.trailing_metadata())
        except asyncio.CancelledError:
            # grpc.aio reports our own cancel like a cancellation of this task, and it cancels the
            # call with the task; but the task may read again later.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            code = grpc.StatusCode.CANCELLED
        if self._cancelled.is_set():
            return None
        if not isinstance(message, pb.GenerateResponse):
            self._resumption.end(code, details, told)
            return None
        return self._resumption.read(message)

    def _call_again(self) -> None:
        self._call.cancel()
        self._call = self._connection.stream(*self._resumption.next_call())

    def cancel(self) -> None:
        """Stops the stream. May be called more than once."""
        release = None if self._cancelled.is_set() else self._resumption.release()
        self._cancelled.set()
        self._call.cancel()
        if release is not None:
            self._connection.release(release)

    def detach(self) -> None:
        """Stops reading, but not the stream, as Stream.detach does."""
        self._cancelled.set()
        self._call.cancel()

    async def close(self) -> None:
        """Cancels a stream that still runs."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()
