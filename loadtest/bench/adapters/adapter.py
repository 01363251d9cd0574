"""What the bench asks of an engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from loadtest.bench.plan import Shape


@dataclass(frozen=True)
class Setting:
    """What an engine is opened with."""

    shape: Shape
    folder: Path
    """Where `prepare` left the model."""
    context: int
    """Tokens that every stream has seen before decoding begins."""
    streams: int
    span: int | None
    threads: int
    room: int
    """Tokens that a stream may decode after its context."""
    open_s: float = math.inf
    """Most seconds that computing the context may take."""
    mode: str = ""
    """What of the engine runs; empty for all of it."""
    weights: str = "float32"
    state: str = "float32"
    """Types of what is stored."""
    source: Path | None = None
    """What the model is made of; None: random weights."""
    device: Literal["cpu", "cuda"] = "cpu"


class TooLong(Exception):
    """The context would take longer to compute than is allowed."""


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


FirstToken = Callable[[], float]
"""Seconds from a prompt of `context` random tokens to the first token after it, anew each call."""


class Adapter(Protocol):
    """A module of this package."""

    def prepare(self, setting: Setting) -> None:
        """Write a model into the setting's folder: of its source, or with random weights."""
        ...

    def open_session(self, setting: Setting) -> Session:
        """An engine at the setting's context, without computing that context where possible.

        Raises TooLong where computing it takes longer than `open_s`.
        """
        ...

    def open_prompt(self, setting: Setting) -> FirstToken:
        """An engine without any context, which keeps nothing of a prompt for the next one."""
        ...
