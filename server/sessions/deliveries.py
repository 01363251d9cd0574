"""What a turn of the engine produced, handed to the event loops: one wake-up of each."""

from __future__ import annotations

from asyncio import AbstractEventLoop

from server.engine.events import Piece
from server.sessions.subscriber import Reader

_Delivery = tuple[Reader, Piece]


class Outbox:
    """Collects on the engine's thread; readers take it in on their own event loops."""

    def __init__(self) -> None:
        self._deliveries: list[_Delivery] = []

    def put(self, reader: Reader, piece: Piece) -> None:
        """Something for a reader."""
        self._deliveries.append((reader, piece))

    def publish(self) -> set[Reader]:
        """Send it all; returns the readers whose loop was closed, which will never read."""
        by_loop: dict[AbstractEventLoop, list[_Delivery]] = {}
        for delivery in self._deliveries:
            by_loop.setdefault(delivery[0].loop, []).append(delivery)
        self._deliveries = []
        gone: set[Reader] = set()
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, deliveries)
            except RuntimeError:  # the loop was closed
                gone |= {reader for reader, _ in deliveries}
        return gone


def _deliver(deliveries: list[_Delivery]) -> None:
    for reader, piece in deliveries:
        reader.deliver(piece)
