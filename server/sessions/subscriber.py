"""The reading half of a stream: what has come for its reader, on the reader's event loop.

A stream can change its subscriber. The new one says what was received before, and is given what
follows: no token is missing, and none comes twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from server.checkpoint import TokenLogprobs
from server.engine.restore import BEGINNING, ResumeCursor
from server.engine.updates import Backlog, Ending, StreamUpdate
from server.request import Request

_PROMPT_EVENT_TOKENS = 512  # whose log-probabilities one event holds at most


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


Event = PromptLogprobs | Delta | Ending


class Subscriber:
    """The buffer of one output. All on its event loop, but for `put`, which the engine calls.

    Outputs of one request share `arrived`. What was received counts from generated token `base` on.
    """

    def __init__(
        self,
        request: Request,
        loop: asyncio.AbstractEventLoop,
        deliveries: Deliveries,
        arrived: asyncio.Event | None = None,
        cursor: ResumeCursor = BEGINNING,
        base: int = 0,
    ) -> None:
        self.request = request
        self.loop = loop
        self.cursor = cursor
        self.is_over = cursor.ended
        self._deliveries = deliveries
        self._published = 0  # tokens that were put; counted on the engine's thread
        self._taken = 0
        self._tokens: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt: list[TokenLogprobs] = []
        self._ending: Ending | None = None
        self._arrived = arrived or asyncio.Event()
        self._known_tokens = cursor.tokens
        self._known_characters = cursor.characters
        self._next_position = len(request.prompt) + base + cursor.tokens
        self._known_prompt = self._next_prompt = cursor.prompt_logprobs

    @property
    def unread(self) -> int:
        """Tokens that were put and not yet taken."""
        return 0 if self.is_over else self._published - self._taken

    def put(self, update: StreamUpdate) -> None:
        """Count an update and have it delivered when the turn ends. On the engine's thread."""
        if update.token is not None:
            self._published += 1
        elif update.backlog is not None:
            self._published += max(0, len(update.backlog.tokens) - self.cursor.tokens)
        self._deliveries.put(self, update)

    def deliver(self, update: StreamUpdate) -> None:
        """Append to the buffer, and wake the reader if there is something for it."""
        if self.is_over:
            return
        if update.backlog is not None:
            self._deliver_backlog(update.backlog)
        if update.token is not None:
            if self._known_tokens:
                self._known_tokens -= 1
                self._taken += 1
            else:
                self._tokens.append(update.token)
                if update.logprobs is not None:
                    self._logprobs.append(update.logprobs)
        if update.text:
            self._append_text(update.text)
        self._append_prompt(update.prompt)
        if update.ending is not None:
            self._ending = update.ending
        if self._is_due or self._prompt:
            self._arrived.set()

    def take(self) -> Event | None:
        """The next event, of everything there is, if one is due; the ending comes last."""
        if self._prompt:
            logprobs = self._prompt[:_PROMPT_EVENT_TOKENS]
            del self._prompt[:_PROMPT_EVENT_TOKENS]
            self._next_prompt += len(logprobs)
            return PromptLogprobs(self._next_prompt - len(logprobs), tuple(logprobs))
        if (self._tokens or self._texts) and self._is_due:
            text, logprobs = "".join(self._texts), self._logprobs
            delta = Delta(self._next_position, tuple(self._tokens), text, tuple(logprobs))
            self._next_position += len(self._tokens)
            self._taken += len(self._tokens)
            self._tokens, self._texts, self._logprobs = [], [], []
            return delta
        if self._ending is not None and not self.is_over:
            self.is_over = True
            return self._ending
        return None

    async def arrival(self) -> None:
        """Wait until something came for this output, or one that shares its arrivals."""
        await self._arrived.wait()
        self._arrived.clear()

    @property
    def _is_due(self) -> bool:
        """Whether the tokens in the buffer need not wait for more."""
        enough = len(self._tokens) >= self.request.stream_interval
        return enough or not self._taken or self._ending is not None

    def _deliver_backlog(self, backlog: Backlog) -> None:
        known = min(self._known_tokens, len(backlog.tokens))
        self._known_tokens -= known
        self._tokens += backlog.tokens[known:]
        self._logprobs += backlog.logprobs[known:]
        self._append_prompt(backlog.prompt)
        self._append_text(backlog.text)

    def _append_prompt(self, logprobs: Sequence[TokenLogprobs]) -> None:
        known = min(self._known_prompt, len(logprobs))
        self._known_prompt -= known
        self._prompt += logprobs[known:]

    def _append_text(self, text: str) -> None:
        known = min(self._known_characters, len(text))
        self._known_characters -= known
        if text := text[known:]:
            self._texts.append(text)


async def events(subscribers: Sequence[Subscriber]) -> AsyncIterator[tuple[Subscriber, Event]]:
    """What comes to subscribers that share their arrivals: each in its order, fairly in turns."""
    while True:
        while due := [(s, event) for s in subscribers if (event := s.take()) is not None]:
            for subscriber, event in due:
                yield subscriber, event
        if all(subscriber.is_over for subscriber in subscribers):
            return
        await subscribers[0].arrival()


class Deliveries:
    """What a turn of the engine put for all subscribers: one wake-up of each event loop."""

    def __init__(self) -> None:
        self._updates: list[_Delivery] = []

    def put(self, subscriber: Subscriber, update: StreamUpdate) -> None:
        """Something for a subscriber."""
        self._updates.append((subscriber, update))

    def publish(self) -> set[Subscriber]:
        """Send it all; returns the subscribers whose loop was closed, who will never read."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Delivery]] = {}
        for delivery in self._updates:
            by_loop.setdefault(delivery[0].loop, []).append(delivery)
        self._updates = []
        gone: set[Subscriber] = set()
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, deliveries)
            except RuntimeError:  # the loop was closed
                gone |= {subscriber for subscriber, _ in deliveries}
        return gone


_Delivery = tuple[Subscriber, StreamUpdate]


def _deliver(deliveries: list[_Delivery]) -> None:
    for subscriber, update in deliveries:
        subscriber.deliver(update)
