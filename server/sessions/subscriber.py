"""Subscribers: they buffer the updates of streams and give them to readers on event loops.

A stream can get a new subscriber. Its resume cursor tells what the reader has received before. It
gets the rest: no token is missing, and none comes twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from server.checkpoint import TokenLogprobs
from server.engine.restore import BEGINNING, ResumeCursor
from server.engine.updates import Backlog, Ending, StreamUpdate
from server.request import Request

EVENT_TOKENS = 4096
"""Most tokens of one event; a backlog of more is sent in parts."""
REPORT_TOKENS = 128
"""Most tokens of one event with log-probabilities: each may come with 86 kB of strings."""
EVENT_CHARACTERS = 1 << 20
"""Most characters of one event."""


@dataclass(frozen=True)
class Delta:
    """Consecutive generated tokens and the text that they complete."""

    first_position: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token; empty if the request did not ask for them."""


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of consecutive prompt tokens."""

    first_position: int
    logprobs: tuple[TokenLogprobs, ...]


Event = PromptLogprobs | Delta | Ending


class Subscriber:
    """Buffers one output for its reader. The engine calls `put`; all else runs on the event loop.

    arrived: set when there is something to take; the outputs of one request share it.
    cursor: what the reader has received, counted from generated token `base` on.
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
        self._published = 0  # tokens put; the engine's thread counts them
        self._taken = 0
        self._tokens: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt: list[TokenLogprobs] = []
        self._ending: Ending | None = None
        self._is_in_parts = False  # the rest of an event that was too large is due at once
        self._arrived = arrived or asyncio.Event()
        self._known_tokens = cursor.tokens
        self._known_characters = cursor.characters
        self._next_position = len(request.prompt) + base + cursor.tokens
        self._known_prompt = self._next_prompt = cursor.prompt_logprobs

    @property
    def unread(self) -> int:
        """Number of tokens that are put but not taken yet."""
        return 0 if self.is_over else self._published - self._taken

    def put(self, update: StreamUpdate) -> None:
        """Count an update, which is delivered when the turn ends. Runs on the engine's thread."""
        if update.token is not None:
            self._published += 1
        elif update.backlog is not None:
            self._published += max(0, len(update.backlog.tokens) - self.cursor.tokens)
        self._deliveries.put(self, update)

    def deliver(self, update: StreamUpdate) -> None:
        """Append an update to the buffer, and wake the reader if an event is due."""
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
        """The next event, with all that is in the buffer; None if none is due."""
        if self._prompt:
            logprobs = self._prompt[:REPORT_TOKENS]
            del self._prompt[:REPORT_TOKENS]
            self._next_prompt += len(logprobs)
            return PromptLogprobs(self._next_prompt - len(logprobs), tuple(logprobs))
        if (self._tokens or self._texts) and self._is_due:
            return self._take_delta()
        if self._ending is not None and not self.is_over:
            self.is_over = True
            return self._ending
        return None

    def _take_delta(self) -> Delta:
        """The tokens and the text of the buffer, or as much as one event may hold.

        Text goes with the last of its tokens, and what does not fit follows alone.
        """
        most = min(EVENT_TOKENS, REPORT_TOKENS) if self._logprobs else EVENT_TOKENS
        tokens, logprobs = self._tokens[:most], self._logprobs[:most]
        del self._tokens[:most], self._logprobs[:most]
        text = ""
        self._is_in_parts = bool(self._tokens)
        if not self._tokens:
            everything = "".join(self._texts)
            text, rest = everything[:EVENT_CHARACTERS], everything[EVENT_CHARACTERS:]
            self._texts = [rest] if rest else []
        delta = Delta(self._next_position, tuple(tokens), text, tuple(logprobs))
        self._next_position += len(tokens)
        self._taken += len(tokens)
        return delta

    async def arrival(self) -> None:
        """Wait until something arrives for this output or another one of the same request."""
        await self._arrived.wait()
        self._arrived.clear()

    @property
    def _is_due(self) -> bool:
        """Whether the tokens in the buffer are enough for an event."""
        enough = self._is_in_parts or len(self._tokens) >= self.request.stream_interval
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


class Audience:
    """All subscribers of one stream. Each gets every update from when it came.

    Only the engine's thread changes `members`.
    """

    def __init__(self, first: Subscriber) -> None:
        self.members = [first]

    @property
    def unread(self) -> int:
        """Unread tokens of the subscriber that lags most."""
        if len(self.members) == 1:  # as nearly always, and this is asked for at every token
            return self.members[0].unread
        return max((member.unread for member in self.members), default=0)

    def put(self, update: StreamUpdate) -> None:
        """Give an update to every subscriber."""
        for member in self.members:
            member.put(update)


async def events(subscribers: Sequence[Subscriber]) -> AsyncIterator[tuple[Subscriber, Event]]:
    """The events of one request's subscribers, in order for each, taking turns between them."""
    while True:
        while due := [(s, event) for s in subscribers if (event := s.take()) is not None]:
            for subscriber, event in due:
                yield subscriber, event
        if all(subscriber.is_over for subscriber in subscribers):
            return
        await subscribers[0].arrival()


class Deliveries:
    """Collects the updates of one turn, and delivers them with one wake-up per event loop."""

    def __init__(self) -> None:
        self._updates: list[_Delivery] = []

    def put(self, subscriber: Subscriber, update: StreamUpdate) -> None:
        """Add an update for a subscriber."""
        self._updates.append((subscriber, update))

    def publish(self) -> set[Subscriber]:
        """Deliver all updates. Returns the subscribers whose event loop is closed."""
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
