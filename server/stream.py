"""One stream: what was asked for, how far it is, and the buffer its reader takes from."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from server.cache import Parked
from server.errors import RequestError
from server.runtime import Ints
from server.sampler import SamplingParameters
from server.text import TextStream


class FinishReason(enum.Enum):
    """Why a stream ended well."""

    END = "end"
    STOP = "stop"
    MAX_TOKENS = "max_tokens"
    TIME_LIMIT = "time_limit"


@dataclass(frozen=True)
class Request:
    """A validated request. `prompt[0]` is the start token; the others are the caller's tokens."""

    prompt: Ints
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    max_tokens: int = 1
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    end_token: int | None = None
    time_limit_s: float | None = None
    complete_at: int | None = None
    """Number of tokens, prompt included, that make the stream complete (an image)."""
    score: bool = False
    """Report how surprising the prompt is instead of generating."""


@dataclass(frozen=True)
class Delta:
    """Tokens that were generated one after the other, and the text they completed."""

    first_position: int
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Finish:
    """The end of a stream that went well; times in seconds since it was accepted."""

    reason: FinishReason
    stop: str | None
    generated: int
    queue_s: float
    first_token_s: float
    total_s: float
    state_bytes: int


@dataclass(frozen=True)
class Scored:
    """Bits by which each token of the prompt surprised the model."""

    bits: tuple[float, ...]


Ending = Finish | Scored | RequestError
Event = Delta | Ending


class Stream:
    """Shared by the engine's thread, which makes progress, and an event loop, which reads.

    The engine alone touches what is above the line, the loop alone what is below it; `deliver` is
    called on the loop.
    """

    def __init__(self, stream_id: str, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self.id = stream_id
        self.request = request
        self.accepted_at = time.monotonic()
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token = int(request.prompt[-1])
        self.generated = 0
        self.text = TextStream(request.stop)
        self.bits: list[float] = []
        self.parked: Parked | None = None
        self.paused = False
        self.published = 0
        self.ended = False
        # ---- below: the event loop's
        self.loop = loop
        self.taken = 0
        self._tokens: list[int] = []
        self._texts: list[str] = []
        self._ending: Ending | None = None
        self._arrived = asyncio.Event()
        self._next_position = len(request.prompt) - 1

    @property
    def expires_at(self) -> float:
        """When its time limit ends, on the monotonic clock."""
        limit = self.request.time_limit_s
        return float("inf") if limit is None else self.accepted_at + limit

    @property
    def unread(self) -> int:
        """Tokens that were published and not yet taken by the reader."""
        return self.published - self.taken

    def unpushed(self, pushed: int) -> Ints:
        """Prompt tokens that prefill still has to push; the last one is left to the first step."""
        return self.request.prompt[pushed:-1]

    def accept_token(self, token: int, now: float) -> tuple[str, FinishReason | None]:
        """Count a drawn token; the text it completes, and why the stream ends if it does."""
        request = self.request
        self.generated += 1
        self.last_token = token
        if self.first_token_at is None:
            self.first_token_at = now
        if token in request.stop_tokens:
            return "", FinishReason.STOP
        if token == request.end_token:
            return "", FinishReason.END
        text = "" if request.complete_at is not None else self.text.push(token)
        if self.text.matched is not None:
            return text, FinishReason.STOP
        if len(request.prompt) - 1 + self.generated == request.complete_at:
            return text, FinishReason.END
        if self.generated >= request.max_tokens:
            return text, FinishReason.MAX_TOKENS
        return text, None

    def finish(self, reason: FinishReason, state_bytes: int, now: float) -> Finish:
        """The record of a stream that ends now."""
        since = self.accepted_at
        return Finish(
            reason,
            self.text.matched,
            self.generated,
            (self.started_at or now) - since,
            (self.first_token_at or now) - since,
            now - since,
            state_bytes,
        )

    def deliver(self, token: int | None, text: str, ending: Ending | None) -> None:
        """Append to the buffer and wake the reader. On the event loop only."""
        if token is not None:
            self._tokens.append(token)
        if text:
            self._texts.append(text)
        if ending is not None:
            self._ending = ending
        self._arrived.set()

    async def events(self) -> AsyncIterator[Event]:
        """Everything there is at each look, as one delta; the ending comes last."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._tokens or self._texts:
                delta = Delta(self._next_position, tuple(self._tokens), "".join(self._texts))
                self._next_position += len(self._tokens)
                self.taken += len(self._tokens)
                self._tokens, self._texts = [], []
                yield delta
            if self._ending is not None:
                yield self._ending
                return
