"""A served bundle with its engine and its sessions, for use from event loops."""

from __future__ import annotations

import asyncio
import secrets
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from server.bundles.bundle import Bundle, load_bundle
from server.checkpoint import Checkpoint
from server.config import EngineConfig
from server.engine.engine import Engine
from server.engine.interfaces import SnapshotStore
from server.engine.restore import BEGINNING, ResumeCursor, restore
from server.engine.stream import Stream
from server.errors import BundleError
from server.request import Lease, Request
from server.sessions.lifecycle import SessionLifecycle
from server.sessions.subscriber import Audience, Deliveries, Event, Subscriber, events
from server.sessions.table import Session


class ServedModel:
    """Serves one bundle: opens sessions and runs their streams. Use it from any event loop."""

    def __init__(
        self, bundle: Bundle, config: EngineConfig, snapshots: SnapshotStore | None = None
    ) -> None:
        self.bundle = bundle.with_template(config.chat_template)
        self.engine = Engine(bundle, config, snapshots)
        self.config = self.engine.config
        self._deliveries = Deliveries()
        self._sessions = SessionLifecycle(
            bundle, self.config, self.engine.streams, self._deliveries, snapshots
        )
        self.table = self._sessions.table
        self.engine.start(self._sessions)

    @property
    def alive(self) -> bool:
        """Whether the engine runs. An engine that has stopped never runs again."""
        return self.engine.alive

    @property
    def is_empty(self) -> bool:
        """Whether it holds no stream and no session."""
        return self.engine.is_empty and not self.holds_sessions

    def require_room(self) -> None:
        """Raises Overloaded if no further stream can be admitted now, and EngineStopped."""
        self.engine.require_room()

    def room_after_s(self, owner: str, ends: int) -> float | None:
        """Estimated seconds until so many of an owner's streams have ended; None if it has none."""
        running = self.table.running(owner)
        return self.engine.room_after_s(ends, running) if running else None

    # ---- streams

    def submit(self, request: Request, owner: str = "") -> Session:
        """Open a session of one output for `owner`. The running event loop reads it.

        Raises Overloaded if there is no room now, InvalidRequest if there never is room, and
        EngineStopped.
        """
        return self.open(Lease(secrets.token_hex(16), (request,), owner))

    def open(
        self,
        lease: Lease,
        checkpoints: Sequence[Checkpoint] = (),
        cursors: Sequence[ResumeCursor] = (),
    ) -> Session:
        """Open a session for a lease, with all of its streams. The running event loop reads them.

        The streams continue from their `checkpoints`, if given, for a reader at `cursors`. Streams
        with the same prompt share one prefill. Raises what `submit` raises.
        """
        session = self.reserve(lease, checkpoints, cursors)
        try:
            self.commit(session)
        except BaseException:
            self.release(session)
            raise
        return session

    def reserve(
        self,
        lease: Lease,
        checkpoints: Sequence[Checkpoint] = (),
        cursors: Sequence[ResumeCursor] = (),
    ) -> Session:
        """Make room for a session that `commit` opens, or `release` gives up. See `open`."""
        checkpoints = checkpoints or [self.no_checkpoint] * len(lease.requests)
        cursors = cursors or [BEGINNING] * len(lease.requests)
        bases = [checkpoint.base_tokens for checkpoint in checkpoints]
        subscribers = self._subscribers(lease.requests, cursors, bases)
        audiences = tuple(Audience(subscriber) for subscriber in subscribers)
        outputs = zip(lease.requests, audiences, checkpoints, cursors, strict=True)
        text = self.bundle.codec.text
        streams = tuple(restore(lease, *output, text) for output in outputs)
        for stream in streams:
            stream.keeps_history |= self.config.draft_tokens > 0
        session = Session(lease, streams, audiences, subscribers, [subscribers])
        self.engine.reserve(session.unfinished)
        return session

    def commit(self, session: Session) -> None:
        """Open a session that has room. Raises EngineStopped."""
        self.engine.admit(session.unfinished, lambda: self._sessions.register(session))

    def release(self, session: Session) -> None:
        """Give back the room of a session that was not opened."""
        self.engine.release(session.unfinished)

    @property
    def no_checkpoint(self) -> Checkpoint:
        """The checkpoint of a new stream."""
        return Checkpoint(array(self.bundle.typecode))

    async def events(
        self, session: Session, subscribers: Sequence[Subscriber] = ()
    ) -> AsyncIterator[tuple[Stream, Event]]:
        """The events of a session's streams, in order for each stream, until all have ended.

        Reads from `subscribers`; by default from those that the session has now.
        """
        subscribers = subscribers or session.subscribers
        streams = dict(zip(subscribers, session.streams, strict=True))
        async for subscriber, event in events(subscribers):
            stream = streams[subscriber]
            if stream.paused:
                self.engine.wake()
            yield stream, event

    def cancel(self, session: Session) -> None:
        """Drop a session soon that nobody reads: its streams end before the next step."""
        self.engine.post(lambda: self._sessions.cancel(session))

    # ---- sessions

    def find(self, stream_id: str, owner: str) -> Session | None:
        """The owner's session of this name; None if this model does not hold it."""
        return self.table.find(stream_id, owner)

    def sessions(self, owner: str) -> list[Session]:
        """The owner's sessions that this model holds."""
        return [s for s in self.table.all() if s.lease.owner == owner]

    @property
    def holds_sessions(self) -> bool:
        """Whether it holds any session: running, waiting or kept."""
        return len(self.table) > 0

    def held_bytes(self, stream: Stream) -> int:
        """Bytes of a stream's saved state, or of the slot that it has or needs."""
        return self._sessions.held_bytes(stream)

    def forgets_at(self, session: Session) -> float | None:
        """When a session without a subscriber is deleted, in Unix time; None if it has one."""
        if (left_at := session.left_at) is None:
            return None
        return time.time() + left_at + session.lease.keep_s - time.monotonic()

    @property
    def largest_snapshot(self) -> int:
        """Largest size of a snapshot in bytes: state, and all tokens with log-probabilities."""
        return 2 * self.bundle.max_state_bytes + 256 * self.bundle.context + 1024 * 1024

    async def attach(
        self, session: Session, cursors: Sequence[ResumeCursor], joins: bool = False
    ) -> tuple[Subscriber, ...]:
        """Attach new subscribers to a session, read by the running event loop.

        The streams of the former ones end with Displaced. Raises EngineStopped.
        """
        bases = [stream.base_tokens for stream in session.streams]
        subscribers = self._subscribers(session.lease.requests, cursors, bases)
        try:
            await self._ask(lambda: self._sessions.attach(session, subscribers, joins))
        except BaseException:  # the engine may have attached them, but no one reads them
            self.leave(session, subscribers)
            raise
        return subscribers

    def leave(self, session: Session, subscribers: tuple[Subscriber, ...]) -> None:
        """Detach subscribers: the session is kept, or its streams end."""
        self.engine.post(lambda: self._sessions.leave(session, subscribers))

    async def pause(self, session: Session) -> None:
        """Pause the streams of a session and save their state. Raises EngineStopped."""
        await self._ask(lambda: self._sessions.pause(session))

    async def lose(self, session: Session, deleted: bool) -> None:
        """Let go of a session that another server owns, or has deleted. Nothing more is stored.

        Raises EngineStopped.
        """
        await self._ask(lambda: self._sessions.lose(session, deleted))

    def lose_soon(self, session: Session, deleted: bool) -> None:
        """The same, soon. From any thread."""
        self.engine.post(lambda: self._sessions.lose(session, deleted))

    async def forget(self, session: Session) -> None:
        """End the streams of a session and delete it from memory. Raises EngineStopped.

        This happens even if the caller is cancelled.
        """
        await asyncio.shield(self._ask(lambda: self._sessions.forget(session)))

    async def hand_over(self) -> None:
        """Store the durable sessions and end their streams here, so that another server continues.

        No further session is opened: a client that resumes needs another server.
        """
        self.engine.stop_accepting()
        await self._ask(self._sessions.hand_over)

    def close(self) -> None:
        """Stop the engine. Streams that have not ended end with an error."""
        self.engine.close()

    def _subscribers(
        self, requests: Sequence[Request], cursors: Sequence[ResumeCursor], bases: Sequence[int]
    ) -> tuple[Subscriber, ...]:
        arrived, loop = asyncio.Event(), asyncio.get_running_loop()
        return tuple(
            Subscriber(request, loop, self._deliveries, arrived, cursor, base)
            for request, cursor, base in zip(requests, cursors, bases, strict=True)
        )

    def _ask(self, action: Callable[[], None]) -> asyncio.Future[None]:
        return asyncio.wrap_future(self.engine.ask(action))


def serve_bundles(
    folders: Sequence[Path], config: EngineConfig, snapshots: SnapshotStore | None = None
) -> dict[str, ServedModel]:
    """Load the bundles in `folders` and start an engine for each. Returns the models by name.

    Raises BundleError if one cannot be served; then no engine runs.
    """
    loaded = [load_bundle(folder) for folder in folders]
    names = [bundle.name for bundle in loaded]
    for bundle in loaded:
        if names.count(bundle.name) > 1:
            raise BundleError(f"{bundle.folder}: another bundle is named {bundle.name!r}, too")
    models: dict[str, ServedModel] = {}
    try:
        for bundle in loaded:
            models[bundle.name] = ServedModel(bundle, config, snapshots)
    except BaseException:
        for model in models.values():
            model.close()
        raise
    return models
