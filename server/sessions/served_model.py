"""A bundle that is served: its engine and the sessions on it, as event loops see them."""

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
from server.sessions.subscriber import Deliveries, Event, Subscriber, events
from server.sessions.table import Session


class ServedModel:
    """Generates streams from one bundle. Its methods may be called from any event loop."""

    def __init__(
        self, bundle: Bundle, config: EngineConfig, snapshots: SnapshotStore | None = None
    ) -> None:
        self.bundle = bundle
        self.config = config
        self.engine = Engine(bundle, config, snapshots)
        self._deliveries = Deliveries()
        self._sessions = SessionLifecycle(
            bundle, config, self.engine.streams, self._deliveries, snapshots
        )
        self.table = self._sessions.table
        self.engine.start(self._sessions)

    @property
    def alive(self) -> bool:
        """Whether the engine runs; once it does not, it never will again."""
        return self.engine.alive

    @property
    def is_empty(self) -> bool:
        """Whether nothing of any stream is left."""
        return self.engine.is_empty and not self.holds_sessions

    def require_room(self) -> None:
        """Raises Overloaded while not one more stream is taken on, and EngineStopped."""
        self.engine.require_room()

    # ---- streams

    def submit(self, request: Request, owner: str = "") -> Session:
        """Queue a stream of `owner` that the running event loop reads.

        Raises Overloaded while there is no room, InvalidRequest if there never is, EngineStopped.
        """
        return self.open(Lease(secrets.token_hex(16), (request,), owner))

    def open(
        self,
        lease: Lease,
        checkpoints: Sequence[Checkpoint] = (),
        cursors: Sequence[ResumeCursor] = (),
    ) -> Session:
        """Queue the streams of a lease, all or none; the running event loop reads them.

        They go on behind their `checkpoints`, if given. Those with the same prompt wait for one
        prefill of it. Raises as `submit` does.
        """
        checkpoints = checkpoints or [self.no_checkpoint] * len(lease.requests)
        cursors = cursors or [BEGINNING] * len(lease.requests)
        bases = [checkpoint.base_tokens for checkpoint in checkpoints]
        subscribers = self._subscribers(lease.requests, cursors, bases)
        outputs = zip(lease.requests, subscribers, checkpoints, cursors, strict=True)
        streams = tuple(restore(lease, *output) for output in outputs)
        for stream in streams:
            stream.keeps_history |= self.config.draft_tokens > 0
        session = Session(lease, streams, subscribers)
        opened = [stream for stream in streams if not stream.ended]
        self.engine.admit(opened, lambda: self._sessions.register(session, opened))
        return session

    @property
    def no_checkpoint(self) -> Checkpoint:
        """That of a stream that has not begun."""
        return Checkpoint(array(self.bundle.typecode))

    async def events(
        self, session: Session, subscribers: Sequence[Subscriber] = ()
    ) -> AsyncIterator[tuple[Stream, Event]]:
        """What happens to the streams of a session, each in its order, until all have ended.

        Without `subscribers`, as those see it with whom the session was opened.
        """
        subscribers = subscribers or session.subscribers
        streams = dict(zip(subscribers, session.streams, strict=True))
        async for subscriber, event in events(subscribers):
            stream = streams[subscriber]
            if stream.paused:
                self.engine.wake()
            yield stream, event

    def cancel(self, session: Session) -> None:
        """Drop the streams of a session; their slots are free before the next step."""
        self.engine.post(lambda: self._sessions.forget(session))

    # ---- sessions

    def find(self, stream_id: str, owner: str) -> Session | None:
        """The owner's session of that name, if this model holds it."""
        return self.table.find(stream_id, owner)

    def sessions(self, owner: str) -> list[Session]:
        """The owner's sessions that this model holds."""
        return [s for s in self.table.all() if s.lease.owner == owner]

    @property
    def holds_sessions(self) -> bool:
        """Whether any stream waits, runs or is kept."""
        return len(self.table) > 0

    def held_bytes(self, stream: Stream) -> int:
        """State that a stream holds outside any slot, or reserves by having one."""
        return self._sessions.held_bytes(stream)

    def forgets_at(self, session: Session) -> float | None:
        """When a session that nobody reads is forgotten, as Unix time."""
        if session.left_at is None:
            return None
        return time.time() + session.expires_at - time.monotonic()

    @property
    def largest_snapshot(self) -> int:
        """Bytes of a snapshot at most: the state, and all tokens with their log-probabilities."""
        return 2 * self.bundle.max_state_bytes + 256 * self.bundle.context + 1024 * 1024

    async def attach(
        self, session: Session, cursors: Sequence[ResumeCursor]
    ) -> tuple[Subscriber, ...]:
        """New subscribers of a session, on the running event loop; those it had are sent away.

        Raises EngineStopped.
        """
        bases = [stream.base_tokens for stream in session.streams]
        subscribers = self._subscribers(session.lease.requests, cursors, bases)
        try:
            await self._ask(lambda: self._sessions.attach(session, subscribers))
        except BaseException:  # they may have been attached, and nobody will read
            self.leave(session, subscribers)
            raise
        return subscribers

    def leave(self, session: Session, subscribers: tuple[Subscriber, ...]) -> None:
        """These subscribers read no more: the session is kept, or its streams end."""
        self.engine.post(lambda: self._sessions.leave(session, subscribers))

    async def pause(self, session: Session) -> None:
        """Stop the streams of a session and keep their state. Raises EngineStopped."""
        await self._ask(lambda: self._sessions.pause(session))

    async def forget(self, session: Session) -> None:
        """End the streams of a session and drop all that is held of it. Raises EngineStopped.

        It is done even if the caller stops waiting.
        """
        await asyncio.shield(self._ask(lambda: self._sessions.forget(session)))

    async def hand_over(self) -> None:
        """Snapshot the durable sessions and end their streams here, so that others go on with them.

        Nothing is opened from then on: a caller who comes back has to find another server.
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
    """Verify and load the bundles in `folders`, and start an engine for each, by name.

    Raises BundleError, with no engine left running, when one cannot be served.
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
