"""A session (the streams of one request), and the table of all sessions of an engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from server.checkpoint import Checkpoint
from server.engine.stream import Stream
from server.request import Lease
from server.sessions.subscriber import Subscriber


@dataclass(eq=False)
class Session:
    """The streams of one request and their subscribers. Only the engine's thread changes it.

    subscribers: one for each output; the last ones, if none is attached now.
    left_at: when the last subscriber left, on the monotonic clock; None while one is attached.
    """

    lease: Lease
    streams: tuple[Stream, ...]
    subscribers: tuple[Subscriber, ...]
    left_at: float | None = None

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
    """The sessions of an engine by name. Any thread may read; the engine's thread removes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_name: dict[str, Session] = {}
        self._left: set[Session] = set()  # sessions without a subscriber

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
        return before

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
        self._left.add(session)

    def attach(self, session: Session) -> None:
        """Record that a subscriber is attached again."""
        session.left_at = None
        self._left.discard(session)

    def drop(self, session: Session) -> None:
        """Remove a session from the table."""
        self._left.discard(session)
        if self.holds(session):
            with self._lock:
                del self._by_name[session.lease.stream_id]

    def expired(self, now: float) -> list[Session]:
        """Sessions whose time without a subscriber is over at `now`."""
        return [session for session in self._left if session.expires_at <= now]

    @property
    def next_expiry(self) -> float:
        """When the next session expires, on the monotonic clock."""
        return min((session.expires_at for session in self._left), default=float("inf"))

    def surplus(self, limit: int, size: Callable[[Stream], int]) -> Collection[Session]:
        """Ended sessions without a subscriber to delete, so that the others use `limit` bytes.

        Those that expire first are deleted first. size: gives the bytes of a stream.
        """
        idle = sorted((s for s in self._left if s.ended), key=lambda s: s.expires_at)
        sizes = [sum(size(stream) for stream in session.streams) for session in idle]
        total, surplus = sum(sizes), list[Session]()
        for session, taken in zip(idle, sizes, strict=True):
            if total <= limit:
                break
            total -= taken
            surplus.append(session)
        return surplus
