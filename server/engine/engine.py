"""Streams from one bundle, as event loops see them; what makes them go on is the loop behind it."""

from __future__ import annotations

import asyncio
import secrets
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence

from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.engine.events import Event, Request
from server.engine.loop import Loop
from server.engine.stream import Past, Stream, Terms
from server.sessions.subscriber import NOTHING, Reader, Received, events
from server.sessions.table import Session
from server.snapshots.snapshots import Keeper


class Engine:
    """Generates streams from one bundle. Its methods may be called from any event loop."""

    def __init__(self, bundle: Bundle, config: EngineConfig, keeper: Keeper | None = None) -> None:
        self.bundle = bundle
        self.config = config
        self._loop = Loop(bundle, config, keeper)

    @property
    def alive(self) -> bool:
        """Whether the loop runs; once it does not, it never will again."""
        return self._loop.alive

    def require_room(self) -> None:
        """Raises Overloaded while not one more stream is taken on, and EngineStopped."""
        self._loop.require_room()

    @property
    def empty_past(self) -> Past:
        """That of a stream that has not begun."""
        return Past(array(self.bundle.typecode))

    def submit(self, request: Request, owner: str = "") -> Stream:
        """Queue a stream of `owner` that the running event loop will read.

        Raises Overloaded while there is no room, InvalidRequest if never, and EngineStopped.
        """
        return self.submit_together([request], owner)[0]

    def submit_together(self, requests: Sequence[Request], owner: str = "") -> tuple[Stream, ...]:
        """Queue streams, all or none, that the running event loop reads with `events_together`.

        Those with the same prompt array wait for one prefill of it. Raises as `submit` does.
        """
        return self.open(Terms(secrets.token_hex(16), owner), requests).streams

    def open(
        self,
        terms: Terms,
        requests: Sequence[Request],
        pasts: Sequence[Past] = (),
        received: Sequence[Received] = (),
    ) -> Session:
        """Queue the streams of a request, all or none; the running event loop reads them.

        They go on behind their `pasts`, if given. Raises as `submit` does.
        """
        arrived, loop = asyncio.Event(), asyncio.get_running_loop()
        pasts = pasts or [self.empty_past] * len(requests)
        received = received or [NOTHING] * len(requests)
        streams = tuple(
            Stream(terms, request, Reader(request, loop, arrived, had, past.base_tokens), past)
            for request, past, had in zip(requests, pasts, received, strict=True)
        )
        for stream in streams:
            stream.remembers |= self.config.draft_tokens > 0
        session = Session(terms, streams)
        self._loop.open(session)
        return session

    def find(self, stream_id: str, owner: str) -> Session | None:
        """The caller's session of that name, if this engine holds it."""
        return self._loop.sessions.find(stream_id, owner)

    def sessions(self, owner: str) -> list[Session]:
        """The caller's sessions that this engine holds."""
        return [s for s in self._loop.sessions.all() if s.terms.owner == owner]

    @property
    def holds_sessions(self) -> bool:
        """Whether any stream waits, runs or is kept."""
        return bool(len(self._loop.sessions))

    def held_bytes(self, stream: Stream) -> int:
        """State that a stream holds outside any slot, or reserves by having one."""
        return self._loop.held_bytes(stream)

    def forgets_at(self, session: Session) -> float | None:
        """When a session that nobody reads is forgotten, as Unix time."""
        if session.left_at is None:
            return None
        return time.time() + session.expires_at - time.monotonic()

    @property
    def largest_snapshot(self) -> int:
        """Bytes of a snapshot at most: the state, and all tokens with their log-probabilities."""
        return 2 * self.bundle.max_state_bytes + 256 * self.bundle.context + 1024 * 1024

    async def attach(self, session: Session, received: Sequence[Received]) -> tuple[Reader, ...]:
        """New readers of a session, on the running event loop; those it had are sent away.

        Raises EngineStopped.
        """
        arrived, loop = asyncio.Event(), asyncio.get_running_loop()
        readers = tuple(
            Reader(stream.request, loop, arrived, had, stream.base_tokens)
            for stream, had in zip(session.streams, received, strict=True)
        )
        try:
            await self._ask(lambda: self._loop.attach(session, readers))
        except BaseException:  # they may have been attached, and nobody will read
            self.leave(session, readers)
            raise
        return readers

    def leave(self, session: Session, readers: Sequence[Reader]) -> None:
        """These readers of a session read no more: it is kept, or its streams end."""
        self._loop.post(lambda: self._loop.leave(session, readers))

    async def pause(self, session: Session) -> None:
        """Stop the streams of a session and keep their state. Raises EngineStopped."""
        await self._ask(lambda: self._loop.pause(session))

    async def forget(self, session: Session) -> None:
        """End the streams of a session and drop all that is held of it. Raises EngineStopped.

        That is done even for who stops waiting.
        """
        await asyncio.shield(
            asyncio.wrap_future(self._loop.ask(lambda: self._loop.forget(session)))
        )

    async def hand_over(self) -> None:
        """Snapshot the durable sessions and end their readers, so that others go on with them.

        Nothing is opened from then on: who comes back is to find another server.
        """
        await asyncio.wrap_future(self._loop.hand_over())

    def cancel(self, stream: Stream) -> None:
        """Drop a stream; its slot is free before the next step. Does nothing once it has ended."""
        self._loop.post(lambda: self._loop.cancel(stream))

    async def events(self, stream: Stream) -> AsyncIterator[Event]:
        """What happens to `stream`, in order; the last event is its ending."""
        async for _, event in self.events_together([stream]):
            yield event

    async def events_together(
        self, streams: Sequence[Stream], readers: Sequence[Reader] = ()
    ) -> AsyncIterator[tuple[Stream, Event]]:
        """What happens to the streams of one request, each in its order, as their readers see it.

        Without `readers`, as those do with whom the streams were opened.
        """
        readers = readers or [stream.reader for stream in streams]
        owners = dict(zip(readers, streams, strict=True))
        async for reader, event in events(readers):
            if owners[reader].paused:
                self._loop.wake()
            yield owners[reader], event

    def close(self) -> None:
        """Stop the loop. Streams that have not ended end with an error."""
        self._loop.close()

    async def _ask(self, action: Callable[[], None]) -> None:
        await asyncio.wrap_future(self._loop.ask(action))
