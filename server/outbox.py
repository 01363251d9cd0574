"""What a turn of the engine produced, handed to the event loops: one wake-up of each."""

from __future__ import annotations

from asyncio import AbstractEventLoop

from server.stream import Piece, Stream

_Delivery = tuple[Stream, Piece]


class Outbox:
    """Collects on the engine's thread; streams take it in on their own event loops."""

    def __init__(self) -> None:
        self._deliveries: list[_Delivery] = []

    def put(self, stream: Stream, piece: Piece) -> None:
        """Something for the reader of `stream`."""
        self._deliveries.append((stream, piece))

    def publish(self) -> set[Stream]:
        """Send it all; returns the streams whose loop was closed, which nobody will ever read."""
        by_loop: dict[AbstractEventLoop, list[_Delivery]] = {}
        for delivery in self._deliveries:
            by_loop.setdefault(delivery[0].loop, []).append(delivery)
        self._deliveries = []
        unread: set[Stream] = set()
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, deliveries)
            except RuntimeError:  # the loop was closed
                unread |= {stream for stream, _ in deliveries}
        return unread


def _deliver(deliveries: list[_Delivery]) -> None:
    for stream, piece in deliveries:
        stream.deliver(piece)
