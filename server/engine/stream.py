"""One output of a request, as the engine's thread sees it: how far it is, and what it has said."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from server.engine.detokenizer import TextStream
from server.engine.events import Backlog, Ending, Finish, FinishReason, Request
from server.engine.kv_cache import Parked
from server.engine.sampling.logits_processors import Memory
from server.engine.sampling.logprobs import TokenLogprobs
from server.runtime.onnx_session import Ints
from server.sessions.subscriber import Reader


@dataclass(frozen=True)
class Terms:
    """Under which a request was accepted; the same for all its outputs.

    origin: the serialised GenerateRequest, with its seed. accepted_at: in seconds of the Unix time.
    """

    stream_id: str
    owner: str = ""
    keep_s: float = 0.0
    origin: bytes = b""
    accepted_at: float = 0.0


@dataclass(frozen=True)
class Past:
    """All that a stream has behind it. What else it holds while it runs follows from this.

    generated: the tokens that were sent, or are to be. parked: the state after some of all its
    tokens, None for the very first. finish: how it ended, None if it did not.
    base_tokens, base_characters: how many there were when the session last went on after a pause.
    queue_s, first_token_s: how long after its acceptance it began, and said its first.
    """

    generated: array[int]
    parked: Parked | None = None
    finish: Finish | None = None
    logprobs: Sequence[TokenLogprobs] = ()
    base_tokens: int = 0
    base_characters: int = 0
    queue_s: float | None = None
    first_token_s: float | None = None

    @property
    def is_paused(self) -> bool:
        """Whether it was stopped in order to go on."""
        return self.finish is not None and self.finish.reason is FinishReason.PAUSED


class Stream:
    """Touched by the engine's thread alone, but for `reader`, which belongs to an event loop."""

    def __init__(self, terms: Terms, request: Request, reader: Reader, past: Past) -> None:
        self.terms = terms
        self.request = request
        self.reader = reader
        told = len(request.prompt) - 1 if request.prompt_logprobs is not None else 0
        if reader.received.prompt_logprobs < told and not past.is_paused:
            past = replace(past, parked=None, finish=None)  # to be told, it has to be pushed again
        elapsed = time.time() - terms.accepted_at if terms.accepted_at else 0.0
        self.accepted_at = time.monotonic() - elapsed
        self.place = (-request.priority, 0)  # in the queue, once its arrival was counted
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.memory: Memory | None = None
        self.bits: list[float] = []
        self.paused = False
        # One whose end its reader knows and we do not runs to it again, for the reader after that.
        self.ended = past.finish is not None
        self.ending: Ending | None = past.finish
        self.base_tokens, self.base_characters = past.base_tokens, past.base_characters
        self.history = array(past.generated.typecode)
        self.said: list[TokenLogprobs] = []
        self.prompt_said: list[TokenLogprobs] = []
        self.text = TextStream(request.stop, request.include_stop)
        self.parked = past.parked
        # What is known of the future: tokens that were drawn once, whose state is lost.
        self.forced = deque(self._revive(past))
        self.remembers = terms.keep_s > 0
        self.behind: list[int] = []  # known tokens before the last one that no pass has kept yet
        self.generated = len(self.history)
        self.last_token = int(self.history[-1] if self.history else request.prompt[-1])
        self._queue_s = past.queue_s
        if past.first_token_s is not None:
            self.first_token_at = self.accepted_at + past.first_token_s
        if self.history:
            self._say(self.history)
        self.snapshot_at = 0 if past.parked is None else past.parked.pushed

    def _revive(self, past: Past) -> Sequence[int]:
        """Take over as much of the past as the state has seen; the tokens that come next, as far as
        they are known."""
        request, received = self.request, self.reader.received
        pushed = 0 if self.parked is None else self.parked.pushed
        # The last token that a stream knows is pushed by the step that draws the next.
        seen = max(0, pushed - (len(request.prompt) - 1))
        if past.finish is not None:
            seen = len(past.generated)
        self.history = past.generated[:seen]
        self.said = list(past.logprobs[:seen])
        known = past.generated[seen:].tolist()
        first = received.tokens + past.base_tokens - len(received.last_ids)
        at = seen + len(known)
        if first <= at < first + len(received.last_ids):
            known += received.last_ids[at - first :]
        return known

    @property
    def id(self) -> str:
        """Name of the stream, which all outputs of a request share."""
        return self.terms.stream_id

    @property
    def is_kept(self) -> bool:
        """Whether the stream outlives its reader."""
        return self.terms.keep_s > 0

    @property
    def past(self) -> Past:
        """A copy of what it has behind it now, but for the state."""
        finish = self.ending if isinstance(self.ending, Finish) else None
        return Past(
            self.history[:],
            None,
            finish,
            tuple(self.said),
            self.base_tokens,
            self.base_characters,
            self._queued(self.started_at),
            self.first_token_at and self.first_token_at - self.accepted_at,
        )

    def latest(self, size: int) -> array[int]:
        """Its last tokens of prompt and output, at most `size`, as far as they are remembered."""
        missing = size - len(self.history)
        if missing <= 0:
            return self.history[-size:]
        return self._prompt[-missing:] + self.history

    @cached_property
    def _prompt(self) -> array[int]:
        """The caller's tokens, as compact as those of the history."""
        return array(self.history.typecode, self.request.prompt[1:].tolist())

    @property
    def backlog(self) -> Backlog:
        """What a new reader may have missed."""
        text = self._everything_said()[self.base_characters :]
        since = self.base_tokens
        return Backlog(self.history[since:], text, self.said[since:], tuple(self.prompt_said))

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
        pushed = 0 if self.parked is None else self.parked.pushed
        return max(0, len(self.request.prompt) - 1 - pushed)

    def shares_prompt(self, other: Stream) -> bool:
        """Whether the state that `other` has after its prompt is what this one needs, and all."""
        mine = self.request
        together = self.id == other.id and mine.prompt is other.request.prompt
        return together and self.parked is None and not mine.predicts_prompt

    @property
    def unread(self) -> int:
        """Tokens that were published and not yet taken by the reader."""
        return self.reader.unread

    def unpushed(self, pushed: int) -> Ints:
        """Prompt tokens that prefill still has to push; the last one is left to the first step."""
        return self.request.prompt[pushed:-1]

    def accept_token(
        self, token: int, now: float, logprobs: TokenLogprobs | None = None
    ) -> tuple[str, FinishReason | None]:
        """Count a drawn token; the text it completes, and why the stream ends if it does."""
        request = self.request
        self.generated += 1
        self.last_token = token
        if self.first_token_at is None:
            self.first_token_at = now
        text = ""
        if not request.is_unsent(token):
            if self.remembers:
                self.history.append(token)
                if logprobs is not None:
                    self.said.append(logprobs)
            if request.complete_at is None:
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
            self._queued(self.started_at or now) or 0.0,
            (self.first_token_at or now) - since,
            now - since,
            state_bytes,
        )

    def _queued(self, started_at: float | None) -> float | None:
        """How long it waited, if not before it was revived."""
        if self._queue_s is not None or started_at is None:
            return self._queue_s
        return started_at - self.accepted_at

    def _say(self, tokens: array[int]) -> str:
        """All text of the `tokens` that the stream begins with; the rest goes on behind it."""
        if self.request.complete_at is not None:
            return ""
        return self.text.replay(bytes(tokens.tolist()))

    def _everything_said(self) -> str:
        if self.request.complete_at is not None:
            return ""
        text = TextStream(self.request.stop, self.request.include_stop)
        matched = self.ending.stop if isinstance(self.ending, Finish) else None
        said = text.replay(bytes(self.history.tolist()), matched)
        paused = isinstance(self.ending, Finish) and self.ending.reason is FinishReason.PAUSED
        if self.ended and matched is None and not paused:
            said += text.flush()
        return said
