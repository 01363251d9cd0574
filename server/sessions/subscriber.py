"""The reading half of a stream: what has come for its reader, on the reader's event loop.

A stream can change its reader. The new one says what was received before, and is given what follows
that: no token is missing, and none comes twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from server.engine.events import Backlog, Delta, Ending, Event, Piece, PromptLogprobs, Request
from server.engine.sampling.logprobs import TokenLogprobs

_PROMPT_EVENT_TOKENS = 512  # of which one event tells the log-probabilities at most


@dataclass(frozen=True)
class Received:
    """What a reader has of an output already."""

    tokens: int = 0
    characters: int = 0
    prompt_logprobs: int = 0
    ended: bool = False
    last_ids: tuple[int, ...] = ()
    """The last of the tokens, oldest first; those before are not known."""


NOTHING = Received()


class Reader:
    """The buffer of one output. All on its event loop, except `published`, which the engine counts.

    Outputs of one request share `arrived`. What was received counts from generated token `base` on.
    """

    def __init__(
        self,
        request: Request,
        loop: asyncio.AbstractEventLoop,
        arrived: asyncio.Event | None = None,
        received: Received = NOTHING,
        base: int = 0,
    ) -> None:
        self.request = request
        self.loop = loop
        self.received = received
        self.published = 0
        self.taken = 0
        self.is_over = received.ended
        self._tokens: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt: list[TokenLogprobs] = []
        self._ending: Ending | None = None
        self._arrived = arrived or asyncio.Event()
        self._known_tokens = received.tokens
        self._known_characters = received.characters
        self._next_position = len(request.prompt) - 1 + base + received.tokens
        self._known_prompt = self._told = received.prompt_logprobs

    @property
    def unread(self) -> int:
        """Tokens that were published and not yet taken."""
        return 0 if self.is_over else self.published - self.taken

    def deliver(self, piece: Piece) -> None:
        """Append to the buffer, and wake the reader if there is something for it."""
        if self.is_over:
            return
        if piece.backlog is not None:
            self._deliver_backlog(piece.backlog)
        if piece.token is not None:
            if self._known_tokens:
                self._known_tokens -= 1
                self.taken += 1
            else:
                self._tokens.append(piece.token)
                if piece.logprobs is not None:
                    self._logprobs.append(piece.logprobs)
        if piece.text:
            self._append_text(piece.text)
        self._append_prompt(piece.prompt)
        if piece.ending is not None:
            self._ending = piece.ending
        if self._is_due or self._prompt:
            self._arrived.set()

    def _deliver_backlog(self, backlog: Backlog) -> None:
        known = min(self._known_tokens, len(backlog.tokens))
        self._known_tokens -= known
        self._tokens += backlog.tokens[known:]
        self._logprobs += backlog.logprobs[known:]
        self._append_prompt(backlog.prompt)
        self._append_text(backlog.text)

    def _append_prompt(self, told: Sequence[TokenLogprobs]) -> None:
        known = min(self._known_prompt, len(told))
        self._known_prompt -= known
        self._prompt += told[known:]

    def _append_text(self, text: str) -> None:
        known = min(self._known_characters, len(text))
        self._known_characters -= known
        if text := text[known:]:
            self._texts.append(text)

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
        """Wait until something came for this output, or one that shares its arrivals."""
        await self._arrived.wait()
        self._arrived.clear()


async def events(readers: Sequence[Reader]) -> AsyncIterator[tuple[Reader, Event]]:
    """What comes to readers that share their arrivals: each in its order, fairly between them."""
    while True:
        while due := [(r, event) for r in readers if (event := r.take()) is not None]:
            for reader, event in due:
                yield reader, event
        if all(reader.is_over for reader in readers):
            return
        await readers[0].arrival()
