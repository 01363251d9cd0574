"""A session (the streams of one request), and the table of all sessions of an engine."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

from server.checkpoint import Checkpoint
from server.engine.stream import Stream
from server.lazy_heap import LazyHeap
from server.request import Lease
from server.sessions.subscriber import Audience, Subscriber


@dataclass(eq=False)
class Session:
    """The streams of one request and their subscribers. Only the engine's thread changes it.

    audiences: of each stream. subscribers: those that came last, one for each output. readers: all
    that are attached, each a group of one for each output. stored: whether the store has it.
    left_at: when the last subscriber left, on the monotonic clock; None while one is attached.
    """

    lease: Lease
    streams: tuple[Stream, ...]
    audiences: tuple[Audience, ...]
    subscribers: tuple[Subscriber, ...]
    readers: list[tuple[Subscriber, ...]]
    left_at: float | None = None
    stored: bool = False

    @property
    def unfinished(self) -> list[Stream]:
        """The streams that have not ended."""
        return [stream for stream in self.streams if not stream.ended]

    @property
    def ended(self) -> bool:
        """Whether all outputs have ended."""
        return all(stream.ended for stream in self.streams)

    @property
    def expires_at(self) -> float:
        """When the session is deleted, on the monotonic clock."""
        return float("inf") if self.left_at is None else self.left_at + self.lease.keep_s

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoints of its streams, with the saved state of those that have ended."""
        return tuple(replace(stream.checkpoint, saved=stream.saved) for stream in self.streams)


class SessionTable:
    """The sessions of an engine by name. Any thread may read; the engine's thread removes.

    No method takes longer than O(log n) but `all`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_name: dict[str, Session] = {}
        self._running: dict[str, set[Stream]] = {}  # of each owner, those that have not ended
        self._left = LazyHeap[Session]()  # sessions without a subscriber, by their expiry
        self._resting = _Resting()

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def num_left(self) -> int:
        """Number of sessions without a subscriber."""
        return len(self._left)

    def add(self, session: Session) -> Session | None:
        """Add a session. Returns the former session of the same name, which it replaces."""
        with self._lock:
            before = self._by_name.get(session.lease.stream_id)
            self._by_name[session.lease.stream_id] = session
            running = [stream for stream in session.streams if not stream.ended]
            if running:
                self._running.setdefault(session.lease.owner, set()).update(running)
        return before

    def ended(self, stream: Stream) -> None:
        """Record that a stream has ended."""
        with self._lock:
            running = self._running.get(stream.lease.owner, set())
            running.discard(stream)
            if not running:
                self._running.pop(stream.lease.owner, None)

    def running(self, owner: str) -> int:
        """Number of the owner's streams that have not ended, since their sessions were added."""
        with self._lock:
            return len(self._running.get(owner, ()))

    def find(self, stream_id: str, owner: str) -> Session | None:
        """The owner's session of this name, or None."""
        with self._lock:
            session = self._by_name.get(stream_id)
        return session if session is not None and session.lease.owner == owner else None

    def all(self) -> list[Session]:
        """All sessions."""
        with self._lock:
            return list(self._by_name.values())

    def holds(self, session: Session) -> bool:
        """Whether the table has this session, and not another one of the same name."""
        with self._lock:
            return self._by_name.get(session.lease.stream_id) is session

    def of(self, stream: Stream) -> Session | None:
        """The session of a stream; None if the table does not have it."""
        with self._lock:
            session = self._by_name.get(stream.id)
        return session if session is not None and stream in session.streams else None

    def leave(self, session: Session) -> None:
        """Record that the last subscriber left."""
        session.left_at = time.monotonic()
        self._left.put(session, session.expires_at)

    def attach(self, session: Session) -> None:
        """Record that a subscriber is attached again."""
        session.left_at = None
        self._left.discard(session)
        self._resting.discard(session)

    def drop(self, session: Session) -> None:
        """Remove a session from the table."""
        self._left.discard(session)
        self._resting.discard(session)
        if self.holds(session):
            with self._lock:
                del self._by_name[session.lease.stream_id]

    @property
    def next_expiry(self) -> float:
        """When the next session expires, on the monotonic clock."""
        return self._left.first_key

    def expired(self, now: float) -> Session | None:
        """A session whose time without a subscriber is over at `now`; None if there is none."""
        return self._left.first if self._left.first_key <= now else None

    # ---- what sessions use that have ended and have no subscriber

    def rest(self, session: Session, nbytes: int) -> None:
        """Record that a session without a subscriber has ended, and uses `nbytes`.

        They count until it has a subscriber again or is dropped.
        """
        self._resting.put(session, nbytes)

    @property
    def resting_bytes(self) -> int:
        """Bytes that all sessions at rest use."""
        return self._resting.nbytes

    def surplus(self, limit: int) -> Session | None:
        """A session at rest to delete, while they use more than `limit` bytes; else None.

        It is the one that was left first, of the owner whose sessions use most.
        """
        return self._resting.first if self._resting.nbytes > limit else None


class _Resting:
    """The bytes of sessions at rest. Each change takes O(log n)."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._by_session: dict[Session, int] = {}
        self._by_owner: dict[str, int] = {}
        self._owners = LazyHeap[str]()  # by the bytes of each, most first
        self._sessions: dict[str, LazyHeap[Session]] = {}  # of each owner, left first

    @property
    def first(self) -> Session:
        """The session that was left first, of the owner whose sessions use most."""
        return self._sessions[self._owners.first].first

    def put(self, session: Session, nbytes: int) -> None:
        """Add a session, or count it again."""
        assert session.left_at is not None
        self.discard(session)
        owner = session.lease.owner
        self._by_session[session] = nbytes
        self._sessions.setdefault(owner, LazyHeap()).put(session, session.left_at)
        self._count(owner, nbytes)

    def discard(self, session: Session) -> None:
        """Remove a session. Does nothing if it is not there."""
        nbytes = self._by_session.pop(session, None)
        if nbytes is None:
            return
        owner = session.lease.owner
        self._sessions[owner].discard(session)
        self._count(owner, -nbytes)
        if not self._sessions[owner]:
            del self._sessions[owner], self._by_owner[owner]
            self._owners.discard(owner)

    def _count(self, owner: str, more: int) -> None:
        self.nbytes += more
        self._by_owner[owner] = self._by_owner.get(owner, 0) + more
        self._owners.put(owner, -self._by_owner[owner])
