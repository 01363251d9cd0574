"""What the bench asks of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loadtest.bench.plan import Shape


@dataclass(frozen=True)
class Setting:
    """What an engine is opened with."""

    shape: Shape
    variant: str
    folder: Path
    """Where `prepare` left the model."""
    context: int
    """Tokens that every stream has seen before decoding begins."""
    streams: int
    span: int | None
    threads: int
    room: int
    """Tokens that a stream may decode after its context."""


@dataclass(frozen=True)
class Window:
    """Tokens of all streams, and the seconds in which they were decoded."""

    tokens: int
    seconds: float


class Session(Protocol):
    """An engine whose streams stand at their context."""

    @property
    def cache_bytes(self) -> int:
        """Bytes that it holds for the state of one stream."""
        ...

    def decode(self, steps: int) -> Window:
        """Decode about `steps` tokens of every stream, from the context on, as often as called."""
        ...

    def close(self) -> None:
        """Stop what runs."""
        ...


class Adapter(Protocol):
    """A module of this package."""

    def prepare(self, setting: Setting) -> None:
        """Write a model with random weights into the setting's folder."""
        ...

    def open_session(self, setting: Setting) -> Session:
        """An engine at the setting's context, without computing that context where possible."""
        ...

    def first_token_s(self, setting: Setting) -> float:
        """Seconds from a prompt of `context` random tokens to the first token after it."""
        ...
