"""A real server that breaks calls where a test says, and a client's streams over it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc

from concertina.client import Accepted, AsyncClient, Client, Event, Finished, PromptLogprobs, Tokens
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import generation_service_pb2_grpc as generation_grpc
from concertina.v1 import model_service_pb2_grpc as model_grpc
from concertina.v1 import session_service_pb2_grpc as session_grpc
from server.api.generation import GenerationServicer
from server.api.servicers import make_servicers
from server.sessions.served_model import ServedModel
from server.snapshots.writer import SnapshotWriter
from tests.server.engines import change_logits

LIMIT_S = 60.0
STATUSES = ("UNAVAILABLE", "INTERNAL", "UNKNOWN", "CANCELLED")
FAULTS = (*STATUSES, "EOF", "HANDED_OVER")


def slow_down(engine: ServedModel) -> None:
    """Makes an engine take its time, so that there is something left to break."""

    def take_time(logits: Any, positions: Any) -> Any:
        time.sleep(0.002)
        return logits

    change_logits(engine, take_time)


class Faulty(generation_grpc.GenerationServiceServicer):
    """The real servicer. Its calls end by the next of `faults`, after so many events.

    asked: the requests that came, and when.
    """

    def __init__(self, real: GenerationServicer) -> None:
        self._real = real
        self.faults: Iterator[tuple[int, str]] = iter(())
        self.asked: list[tuple[float, Any]] = []

    async def Generate(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        """As the contract says, until the fault."""
        events = self._real.Generate(request, context)
        async for event in self._broken(request, events, context):
            yield event

    async def Resume(
        self, request: pb.ResumeRequest, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        """As the contract says, until the fault."""
        events = self._real.Resume(request, context)
        async for event in self._broken(request, events, context):
            yield event

    async def Score(self, request: pb.ScoreRequest, context: Any) -> Any:
        """As the contract says."""
        return await self._real.Score(request, context)

    async def _broken(
        self, request: Any, events: AsyncIterator[pb.GenerateResponse], context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.asked.append((time.monotonic(), request))
        left, fault = next(self.faults, (1 << 30, ""))
        sequence = getattr(request, "after_sequence", 0)
        try:
            while left:
                left -= 1
                try:
                    event = await anext(events)
                except StopAsyncIteration:
                    return
                sequence = event.sequence
                yield event
            # What was lost on the way: the server said it, and nobody heard.
            if await anext(events, None) is None:
                return  # it was over
        finally:
            await events.aclose()  # type: ignore[attr-defined]
        if fault == "HANDED_OVER" and sequence:
            handed_over = pb.HandedOver()
            yield pb.GenerateResponse(sequence=sequence + 1, handed_over=handed_over)
        elif fault not in ("EOF", "HANDED_OVER"):
            await context.abort(grpc.StatusCode[fault], "a fault of the test")


def random_faults(seed: int, kinds: Iterable[str] = FAULTS) -> Iterator[tuple[int, str]]:
    """Without end: after 0 to 4 events, one of these kinds."""
    kinds, draw = tuple(kinds), random.Random(seed)
    while True:
        yield draw.choice((0, 1, 1, 2, 3, 4)), draw.choice(kinds)


@dataclass
class Faults:
    """A running server. address: where it listens."""

    address: str
    servicer: Faulty


@asynccontextmanager
async def serving(
    engines: Mapping[str, ServedModel], keeper: SnapshotWriter | None = None
) -> AsyncIterator[Faults]:
    """A real server over these engines, on loopback."""
    servicers = make_servicers(None, engines, keeper)
    servicer = Faulty(servicers.generation)
    server = grpc.aio.server()
    generation_grpc.add_GenerationServiceServicer_to_server(servicer, server)
    session_grpc.add_SessionServiceServicer_to_server(servicers.sessions, server)
    model_grpc.add_ModelServiceServicer_to_server(servicers.models, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield Faults(address, servicer)
    finally:
        await server.stop(None)


class Wire:
    """What lies between a client and `target`, the address of a server: connections to cut."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.address = ""
        self._open: set[asyncio.StreamWriter] = set()

    def cut(self) -> None:
        """Resets every connection."""
        for writer in self._open:
            writer.transport.abort()

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Passes bytes on between a client and the server."""
        with suppress(OSError):
            host, _, port = self.target.rpartition(":")
            back, forth = await asyncio.open_connection(host, int(port))
            self._open |= {writer, forth}
            try:
                await asyncio.gather(_pass_on(reader, forth), _pass_on(back, writer))
            finally:
                self._open -= {writer, forth}
                forth.transport.abort()
        writer.transport.abort()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    raise ConnectionResetError("one side is gone")


@asynccontextmanager
async def wire(target: str) -> AsyncIterator[Wire]:
    """A port on loopback that leads to `target`."""
    laid = Wire(target)
    server = await asyncio.start_server(laid.connect, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    laid.address = f"{host}:{port}"
    try:
        yield laid
    finally:
        server.close()
        laid.cut()
        await asyncio.sleep(0.05)


@dataclass
class Content:
    """All that counts of a stream, and how often it went on."""

    ids: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    rgb: dict[int, bytes] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    prompt: list[Any] = field(default_factory=list)
    ends: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    resumed: int = field(default=0, compare=False)

    def take(self, event: Event) -> None:
        """One event."""
        match event:
            case Tokens(output=output):
                self.ids.setdefault(output, []).extend(event.ids)
                self.texts[output] = self.texts.get(output, "") + event.text
                self.rgb[output] = self.rgb.get(output, b"") + event.rgb
                self.logprobs.setdefault(output, []).extend(_rounded(event.logprobs))
            case PromptLogprobs():
                self.prompt += _rounded(event.logprobs)
            case Finished():
                generated = event.usage.generated_tokens
                self.ends[event.output] = (event.reason, event.stop, generated)
            case Accepted():
                pass


def _rounded(told: Iterable[Any]) -> list[Any]:
    return [(round(one.logprob, 3), one.top_ids) for one in told]


Read = Callable[..., Any]


async def read_async(address: str, **asked: Any) -> Content:
    """A stream as AsyncClient gives it."""
    content = Content()
    async with asyncio.timeout(LIMIT_S), AsyncClient(address) as client:
        async with client.generate(**asked) as stream:
            async for event in stream:
                content.take(event)
        content.resumed = stream.resumed
    return content


async def read_blocking(address: str, **asked: Any) -> Content:
    """A stream as Client gives it."""

    def read() -> Content:
        content = Content()
        with Client(address) as client:
            with client.generate(**asked) as stream:
                for event in stream:
                    content.take(event)
            content.resumed = stream.resumed
        return content

    return await asyncio.wait_for(asyncio.to_thread(read), LIMIT_S)
