"""One stream: what was asked for, how far it is, and the buffer its reader takes from."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from server.cache import Parked
from server.errors import RequestError
from server.logit_rules import Memory
from server.logprobs import TokenLogprobs
from server.runtime import Ints
from server.sampler import SamplingParameters
from server.text import TextStream

_PROMPT_EVENT_TOKENS = 512  # of which one event tells the log-probabilities at most


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
    include_stop: bool = False
    min_tokens: int = 0
    end_token: int | None = None
    time_limit_s: float | None = None
    complete_at: int | None = None
    """Number of tokens, prompt included, that make the stream complete (an image)."""
    score: bool = False
    """Report how surprising the prompt is instead of generating."""
    prompt_logprobs: int | None = None
    """How many of the likeliest tokens are reported with each token of the prompt."""
    stream_interval: int = 1
    """Fewest tokens of a delta that is neither the first nor the last."""
    priority: int = 0
    """Streams of a higher one go first, and take the slots of those of a lower one."""

    @property
    def last_position(self) -> int:
        """Tokens that the stream has pushed at its end, if nothing ends it before."""
        return len(self.prompt) - 1 + (0 if self.score else self.max_tokens)

    @property
    def predicts_prompt(self) -> bool:
        """Whether the logits of the prompt's tokens are needed."""
        return self.score or self.prompt_logprobs is not None

    def is_unsent(self, token: int) -> bool:
        """Whether the stream ends with this token and without sending it."""
        return token == self.end_token or (token in self.stop_tokens and not self.include_stop)


@dataclass(frozen=True)
class Delta:
    """Tokens that were generated one after the other, and the text they completed."""

    first_position: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token, if they were asked for."""


@dataclass(frozen=True)
class PromptLogprobs:
    """Tokens of the prompt, one after the other, and how likely they were."""

    first_position: int
    logprobs: tuple[TokenLogprobs, ...]


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
Event = PromptLogprobs | Delta | Ending


class Piece(NamedTuple):
    """What one pass of the model adds to a stream's buffer."""

    token: int | None = None
    text: str = ""
    logprobs: TokenLogprobs | None = None
    prompt: Sequence[TokenLogprobs] = ()
    ending: Ending | None = None


class Stream:
    """Shared by the engine's thread, which makes progress, and an event loop, which reads.

    The engine alone touches what is above the line, the loop alone what is below it; `deliver` is
    called on the loop.
    """

    def __init__(
        self,
        stream_id: str,
        request: Request,
        loop: asyncio.AbstractEventLoop,
        arrived: asyncio.Event | None = None,
    ) -> None:
        self.id = stream_id
        self.request = request
        self.accepted_at = time.monotonic()
        self.place = (-request.priority, 0)  # in the queue, once its arrival was counted
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token = int(request.prompt[-1])
        self.generated = 0
        self.text = TextStream(request.stop, request.include_stop)
        self.memory: Memory | None = None
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
        self._logprobs: list[TokenLogprobs] = []
        self._prompt: list[TokenLogprobs] = []
        self._ending: Ending | None = None
        self._arrived = arrived or asyncio.Event()  # outputs of one request share it
        self._next_position = len(request.prompt) - 1
        self._told = 0  # of the prompt's tokens
        self.is_over = False

    @property
    def expires_at(self) -> float:
        """When its time limit ends, on the monotonic clock."""
        limit = self.request.time_limit_s
        return float("inf") if limit is None else self.accepted_at + limit

    @property
    def priority(self) -> int:
        """Who goes first."""
        return self.request.priority

    @property
    def to_prefill(self) -> int:
        """Tokens of the prompt to push before the stream can join the batch."""
        return 0 if self.parked is not None else len(self.request.prompt) - 1

    def shares_prompt(self, other: Stream) -> bool:
        """Whether the state that `other` has after its prompt is what this one needs, and all."""
        mine = self.request
        together = self.id == other.id and mine.prompt is other.request.prompt
        return together and not mine.predicts_prompt

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
        text = ""
        if request.complete_at is None and not request.is_unsent(token):
            text = self.text.push(token, self.generated > request.min_tokens)
        if token in request.stop_tokens or self.text.matched is not None:
            return text, FinishReason.STOP
        if token == request.end_token:
            return text, FinishReason.END
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

    def deliver(self, piece: Piece) -> None:
        """Append to the buffer, and wake the reader if there is something for it.

        On the event loop only.
        """
        if piece.token is not None:
            self._tokens.append(piece.token)
        if piece.text:
            self._texts.append(piece.text)
        if piece.logprobs is not None:
            self._logprobs.append(piece.logprobs)
        self._prompt += piece.prompt
        if piece.ending is not None:
            self._ending = piece.ending
        if self._is_due or self._prompt:
            self._arrived.set()

    @property
    def _is_due(self) -> bool:
        """Whether the tokens in the buffer need not wait for more."""
        enough = len(self._tokens) >= self.request.stream_interval
        return enough or not self.taken or self._ending is not None

    def take(self) -> Event | None:
        """The next event, of everything there is, if one is due; the ending comes last."""
        if self._prompt:
            told = self._prompt[:_PROMPT_EVENT_TOKENS]
            del self._prompt[:_PROMPT_EVENT_TOKENS]
            self._told += len(told)
            return PromptLogprobs(self._told - len(told), tuple(told))
        if (self._tokens or self._texts) and self._is_due:
            text, logprobs = "".join(self._texts), tuple(self._logprobs)
            delta = Delta(self._next_position, tuple(self._tokens), text, logprobs)
            self._next_position += len(self._tokens)
            self.taken += len(self._tokens)
            self._tokens, self._texts, self._logprobs = [], [], []
            return delta
        if self._ending is not None and not self.is_over:
            self.is_over = True
            return self._ending
        return None

    async def arrival(self) -> None:
        """Wait until something came for this stream, or one that shares its arrivals."""
        await self._arrived.wait()
        self._arrived.clear()


async def events(streams: Sequence[Stream]) -> AsyncIterator[tuple[Stream, Event]]:
    """What happens to streams that share their arrivals: each in its order, fairly between them."""
    while True:
        while due := [(s, event) for s in streams if (event := s.take()) is not None]:
            for stream, event in due:
                yield stream, event
        if all(stream.is_over for stream in streams):
            return
        await streams[0].arrival()


def outcome(ending: Ending | None) -> str:
    """One word for how a stream ended; None for one that its reader left."""
    match ending:
        case Finish(reason=reason):
            return reason.value
        case Scored():
            return "scored"
        case None:
            return "cancelled"
        case _:
            return "error"
