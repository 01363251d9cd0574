"""The streams of one request under one name, and whether anybody reads them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from server.reader import Reader
from server.stream import Past, Stream, Terms


@dataclass(eq=False)
class Session:
    """What an engine holds of a request. Touched by the engine's thread, once it is open.

    left_at: when its last reader went, on the monotonic clock; None while there is one.
    """

    terms: Terms
    streams: tuple[Stream, ...]
    left_at: float | None = None

    @property
    def readers(self) -> tuple[Reader, ...]:
        """Those who read it now, or did last; one for each output."""
        return tuple(stream.reader for stream in self.streams)

    @property
    def ended(self) -> bool:
        """Whether every output has."""
        return all(stream.ended for stream in self.streams)

    @property
    def expires_at(self) -> float:
        """When it is forgotten, on the monotonic clock."""
        return float("inf") if self.left_at is None else self.left_at + self.terms.keep_s

    @property
    def pasts(self) -> tuple[Past, ...]:
        """What its streams have behind them; of those that ended, also the state."""
        return tuple(replace(stream.past, parked=stream.parked) for stream in self.streams)

    def leave(self) -> None:
        """Nobody reads it any more."""
        self.left_at = time.monotonic()
