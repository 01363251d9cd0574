"""The steps in a session's life on the engine's thread: open, attach, leave, pause, forget.

`SessionLifecycle` is the `StreamHolder` of an engine (see `server.engine.interfaces`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from server.bundles.bundle import Bundle
from server.checkpoint import FinishReason
from server.config import EngineConfig
from server.engine.engine import NOT_OPENED
from server.engine.interfaces import SnapshotStore
from server.engine.lifecycle import StreamLifecycle
from server.engine.stream import Stream
from server.engine.updates import HandedOver, StreamUpdate
from server.errors import Displaced, StepFailed, UnknownSession
from server.sessions.subscriber import Deliveries, Subscriber
from server.sessions.table import Session, SessionTable


class SessionLifecycle:
    """Changes the phase of an engine's sessions. All but `register` runs on the engine's thread."""

    def __init__(
        self,
        bundle: Bundle,
        config: EngineConfig,
        streams: StreamLifecycle,
        deliveries: Deliveries,
        snapshots: SnapshotStore | None,
    ) -> None:
        self.table = SessionTable()
        self._bundle = bundle
        self._config = config
        self._streams = streams
        self._deliveries = deliveries
        self._snapshots = snapshots

    def register(self, session: Session) -> Callable[[], None]:
        """Add a session to the table. Returns the action that opens it on the engine's thread."""
        before, opened = self.table.add(session), session.unfinished
        return lambda: self._open(session, opened, before)

    def attach(
        self, session: Session, subscribers: tuple[Subscriber, ...], joins: bool = False
    ) -> None:
        """Give a session new subscribers. The streams of the others end with Displaced.

        joins: the others stay. Raises UnknownSession if the session is gone, or another one has
        taken its name.
        """
        self._require_held(session)
        missed = [_missed(stream) for stream in session.streams]  # if this raises, nothing changed
        if not (joins and session.readers):
            displaced = StreamUpdate(ending=Displaced("another reader has resumed the stream"))
            for reader in [each for group in session.readers for each in group]:
                reader.put(displaced)
            session.readers.clear()
            for audience in session.audiences:
                audience.members.clear()
        outputs = zip(missed, session.audiences, subscribers, strict=True)
        for updates, audience, subscriber in outputs:
            for update in updates:
                subscriber.put(update)
            audience.members.append(subscriber)
        session.subscribers = subscribers
        session.readers.append(subscribers)
        self.table.attach(session)

    def leave(self, session: Session, subscribers: tuple[Subscriber, ...]) -> None:
        """Detach subscribers. With the last of them, the session is kept, or its streams end."""
        if not self.table.holds(session) or subscribers not in session.readers:
            return  # the session is gone, or they were displaced
        session.readers.remove(subscribers)
        if session.readers:
            for audience, subscriber in zip(session.audiences, subscribers, strict=True):
                audience.members.remove(subscriber)
            return
        # The last subscribers stay in the audience: their full buffers park the streams.
        if not session.lease.keep_s:
            for stream in session.streams:
                self._streams.cancel(stream)
            return
        self.table.leave(session)
        self._rest_if_ended(session)

    def pause(self, session: Session) -> None:
        """Pause the streams of a session and save their state. Raises UnknownSession."""
        self._require_held(session)
        for stream in [s for s in session.streams if not s.ended]:
            self._streams.stop(stream, FinishReason.PAUSED)

    def forget(self, session: Session) -> None:
        """End the streams of a session, with UnknownSession for its readers, and delete it."""
        gone = _deleted(session) if session.readers else None
        for stream in session.streams:
            self._streams.end(stream, gone)
        self.table.drop(session)

    def cancel(self, session: Session) -> None:
        """Forget a session whose readers have gone."""
        session.readers.clear()
        self.forget(session)

    def lose(self, session: Session, deleted: bool) -> None:
        """Let go of a session that another server owns, or has deleted. Nothing more is stored."""
        if not self.table.holds(session):
            return
        for stream in session.unfinished:
            self._streams.end(stream, _deleted(session) if deleted else HandedOver())
        self.table.drop(session)

    def held_bytes(self, stream: Stream) -> int:
        """Bytes of a stream's saved state, or of the slot that it has or needs."""
        if (saved := stream.saved) is not None:
            return sum(self._bundle.state_bytes(saved.pushed).values())
        return 0 if stream.ended else self._bundle.max_state_bytes

    # ---- StreamHolder

    @property
    def next_expiry(self) -> float:
        """See StreamHolder."""
        return self.table.next_expiry

    def expire(self, now: float) -> None:
        """See StreamHolder."""
        while (session := self.table.expired(now)) is not None:
            self.forget(session)

    def ended(self, stream: Stream) -> None:
        """See StreamHolder."""
        self.table.ended(stream)
        session = self.table.of(stream)
        if session is None or not session.ended:
            return
        if stream.is_kept:
            self._rest_if_ended(session)
        else:
            self.table.drop(session)

    def publish(self) -> None:
        """See StreamHolder. Also detaches subscribers whose event loop is closed."""
        gone = self._deliveries.publish()
        for session in self.table.all() if gone else ():
            for group in [each for each in session.readers if gone.intersection(each)]:
                self.leave(session, group)

    def hand_over(self) -> None:
        """See StreamHolder. Does nothing without a store that outlives this process."""
        if self._snapshots is None or not self._snapshots.is_durable:
            return
        for session in [s for s in self.table.all() if s.lease.keep_s]:
            for stream in [s for s in session.streams if not s.ended]:
                self._streams.hand_over(stream, HandedOver())
            self.table.drop(session)

    def _require_held(self, session: Session) -> None:
        if not self.table.holds(session):
            raise UnknownSession(
                f"stream {session.lease.stream_id!r} was deleted or continued by another call"
            )

    def _rest_if_ended(self, session: Session) -> None:
        """Count what a session uses if it has ended and has no subscriber. Too much is deleted."""
        if session.left_at is None or not session.ended:
            return
        sizes = (self.held_bytes(each) + each.retained_bytes for each in session.streams)
        self.table.rest(session, sum(sizes))
        while (surplus := self.table.surplus(self._config.session_bytes)) is not None:
            self.forget(surplus)

    def _open(self, session: Session, opened: Sequence[Stream], before: Session | None) -> None:
        """Take the place of the session `before`, send what readers missed, and start streams.

        If this raises, the readers of streams that have ended get an error; the engine ends the
        others.
        """
        outputs = list(zip(session.streams, session.subscribers, strict=True))
        ended = {reader for stream, reader in outputs if stream.ended}
        try:
            if before is not None:
                for stream in [s for s in before.streams if not s.ended]:
                    displaced = Displaced("another request has restarted the stream")
                    self._streams.end(stream, displaced)
                self.table.drop(before)
            for stream, reader in outputs:
                if not reader.cursor.ended:
                    for update in _missed(stream):
                        reader.put(update)
                ended.discard(reader)
            for stream in opened:
                self._streams.enqueue(stream)
        except Exception:
            for reader in ended:
                reader.put(StreamUpdate(ending=StepFailed(NOT_OPENED)))
            raise


def _deleted(session: Session) -> UnknownSession:
    return UnknownSession(f"stream {session.lease.stream_id!r} was deleted")


def _missed(stream: Stream) -> list[StreamUpdate]:
    """What a new subscriber gets: the output so far, and the ending if there is one."""
    updates = []
    if (backlog := stream.backlog) is not None:
        updates.append(StreamUpdate(backlog=backlog))
    if stream.ended and stream.ending is not None:
        updates.append(StreamUpdate(ending=stream.ending))
    return updates
