"""What the engine uses: subscribers, the holder of its streams, and the snapshot store.

All methods are called on the engine's thread and must not block.
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
    """Receives the updates of one stream."""

    @property
    def unread(self) -> int:
        """Number of tokens that are put but not read yet."""

    def put(self, update: StreamUpdate) -> None:
        """Add an update. It may be delivered later, at the end of the turn."""


class StreamHolder(Protocol):
    """Owns the streams of an engine and decides how long to keep them."""

    @property
    def next_expiry(self) -> float:
        """When the next kept stream expires, on the monotonic clock."""

    def expire(self, now: float) -> None:
        """Delete what has expired at `now`. Called once a turn."""

    def ended(self, stream: Stream) -> None:
        """Called when a stream has ended and has left the engine."""

    def publish(self) -> None:
        """Deliver the updates of this turn to the subscribers."""

    def hand_over(self) -> None:
        """Called when the engine stops: store the streams that another server can continue."""


class SnapshotStore(Protocol):
    """Stores checkpoints of streams, on a thread of its own."""

    @property
    def is_durable(self) -> bool:
        """Whether stored checkpoints outlive this process."""

    def offer(self, bundle: Bundle, lease: Lease, output: int, checkpoint: Checkpoint) -> None:
        """Store the checkpoint of an output later, on the store's thread."""
