"""The streams of one request under one name, and the table of those names."""

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
    """What an engine holds of a request. Touched by the engine's thread, once it is open.

    subscribers: those who read it now, or did last; one for each output.
    left_at: when its last subscriber went, on the monotonic clock; None while there is one.
    """

    lease: Lease
    streams: tuple[Stream, ...]
    subscribers: tuple[Subscriber, ...]
    left_at: float | None = None

    @property
    def ended(self) -> bool:
        """Whether every output has."""
        return all(stream.ended for stream in self.streams)

    @property
    def expires_at(self) -> float:
        """When it is forgotten, on the monotonic clock."""
        return float("inf") if self.left_at is None else self.left_at + self.lease.keep_s

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """How far its streams are; of those that ended, also the state."""
        return tuple(replace(stream.checkpoint, saved=stream.saved) for stream in self.streams)


class SessionTable:
    """The sessions of an engine by name. Any thread may look; the engine's alone takes out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_name: dict[str, Session] = {}
        self._left: set[Session] = set()  # those that nobody reads

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def num_left(self) -> int:
        """Sessions that nobody reads."""
        return len(self._left)

    def add(self, session: Session) -> Session | None:
        """Hold a session, in place of one of the same name, which is given back."""
        with self._lock:
            before = self._by_name.get(session.lease.stream_id)
            self._by_name[session.lease.stream_id] = session
        return before

    def find(self, stream_id: str, owner: str) -> Session | None:
        """The owner's session of that name."""
        with self._lock:
            session = self._by_name.get(stream_id)
        return session if session is not None and session.lease.owner == owner else None

    def all(self) -> list[Session]:
        """Every session."""
        with self._lock:
            return list(self._by_name.values())

    def holds(self, session: Session) -> bool:
        """Whether this very session is held."""
        with self._lock:
            return self._by_name.get(session.lease.stream_id) is session

    def of(self, stream: Stream) -> Session | None:
        """The session of a stream, if it is held."""
        with self._lock:
            session = self._by_name.get(stream.id)
        return session if session is not None and stream in session.streams else None

    def leave(self, session: Session) -> None:
        """Nobody reads it any more."""
        session.left_at = time.monotonic()
        self._left.add(session)

    def return_to(self, session: Session) -> None:
        """Somebody reads it again."""
        session.left_at = None
        self._left.discard(session)

    def drop(self, session: Session) -> None:
        """Hold it no longer."""
        self._left.discard(session)
        if self.holds(session):
            with self._lock:
                del self._by_name[session.lease.stream_id]

    def expired(self, now: float) -> list[Session]:
        """Those that nobody has read for as long as they are kept."""
        return [session for session in self._left if session.expires_at <= now]

    @property
    def next_expiry(self) -> float:
        """When the next one expires."""
        return min((session.expires_at for session in self._left), default=float("inf"))

    def beyond(self, limit: int, size: Callable[[Stream], int]) -> Collection[Session]:
        """Those at rest, left first, without which the others hold at most `limit` bytes."""
        resting = sorted((s for s in self._left if s.ended), key=lambda s: s.expires_at)
        sizes = [sum(size(stream) for stream in session.streams) for session in resting]
        total, surplus = sum(sizes), list[Session]()
        for session, taken in zip(resting, sizes, strict=True):
            if total <= limit:
                break
            total -= taken
            surplus.append(session)
        return surplus
