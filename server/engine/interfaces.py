"""What the engine needs of those around it: who reads a stream, who holds it, who stores it.

All methods are called on the engine's thread, and must not wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from server.bundles.bundle import Bundle
from server.checkpoint import Checkpoint
from server.engine.updates import StreamUpdate
from server.request import Lease

if TYPE_CHECKING:
    from server.engine.stream import Stream


class Subscriber(Protocol):
    """Takes the updates of one stream."""

    @property
    def unread(self) -> int:
        """Tokens that were put and are not read yet."""

    def put(self, update: StreamUpdate) -> None:
        """Add an update; it may be passed on with others when the turn ends."""


class StreamHolder(Protocol):
    """Owns the streams of an engine, and decides how long they are kept."""

    @property
    def next_expiry(self) -> float:
        """When `expire` has something to do next, on the monotonic clock."""

    def expire(self, now: float) -> None:
        """Let go of what was kept long enough; called once a turn."""

    def ended(self, stream: Stream) -> None:
        """The stream is over, and in none of the engine's places any more."""

    def publish(self) -> None:
        """Pass on what the turn put."""

    def hand_over(self) -> None:
        """The engine stops: save what can go on elsewhere."""


class SnapshotStore(Protocol):
    """Stores checkpoints of streams, on a thread of its own."""

    @property
    def is_durable(self) -> bool:
        """Whether what it stores outlives this process."""

    def offer(self, bundle: Bundle, lease: Lease, output: int, checkpoint: Checkpoint) -> None:
        """Store how far an output is, soon."""
