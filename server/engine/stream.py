"""One output of a request, as the engine's thread holds it: tokens, state, times."""

from __future__ import annotations

import time
from array import array
from collections import deque
from itertools import chain

from concertina.codecs.token_text import TokenText
from server.checkpoint import Checkpoint, Finish, FinishReason, SavedState, TokenLogprobs
from server.engine.detokenizer import Detokenizer
from server.engine.interfaces import Subscriber
from server.engine.sampling.grammar_state import GrammarState
from server.engine.sampling.logits_processors import PenaltyState
from server.engine.updates import Backlog, Ending
from server.request import NUMBER_BYTES, Lease, Request

_LOGPROBS_BYTES, _TOP_BYTES = 256, 72  # of a TokenLogprobs, and of each token that it lists


class Stream:
    """A stream. The constructor makes a new one, `server.engine.restore` one that continues.

    typecode: integer type of its tokens (see `array.array`). text: what they stand for. After
    admission, only the engine's thread changes a stream.
    """

    def __init__(
        self,
        lease: Lease,
        request: Request,
        subscriber: Subscriber,
        typecode: str,
        text: TokenText,
    ) -> None:
        self.lease = lease
        self.request = request
        self.subscriber = subscriber
        elapsed = time.time() - lease.accepted_at if lease.accepted_at else 0.0
        self.accepted_at = time.monotonic() - elapsed
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.queue_s: float | None = None  # from acceptance to start, if it began before a restore
        self.queue_key = (-request.priority, 0)  # order in the queue: priority, then arrival
        self.paused = False
        self.preemptions = 0
        self.ended = False
        self.ending: Ending | None = None
        # Its output. Tokens before `base_tokens` came before it was last continued.
        self.history = array(typecode)
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self._text = text
        self.detokenizer = self._new_detokenizer()
        self.base_tokens = self.base_characters = 0
        self.keeps_history = lease.keep_s > 0
        self._final = request.stop_tokens | request.end_tokens
        # How far the model is.
        self.generated = 0
        self.last_token = request.prompt.last
        self.saved: SavedState | None = None
        self.snapshot_at = 0  # number of tokens pushed at the last snapshot
        self.replay_tokens: deque[int] = deque()  # drawn before, but not in the state
        self.uncommitted: list[int] = []  # tokens before the last one, not yet in the state
        self.penalties: PenaltyState | None = None
        self.grammar: GrammarState | None = None
        self.prompt_bits: list[float] = []

    @property
    def id(self) -> str:
        """Name of the stream. All outputs of a request share it."""
        return self.lease.stream_id

    @property
    def output(self) -> int:
        """Index among the outputs of its request."""
        return self.request.sampling.output

    @property
    def is_kept(self) -> bool:
        """Whether the stream continues without a subscriber."""
        return self.lease.keep_s > 0

    @property
    def was_paused(self) -> bool:
        """Whether it has ended by a pause, so that it can be continued."""
        return isinstance(self.ending, Finish) and self.ending.reason is FinishReason.PAUSED

    @property
    def priority(self) -> int:
        """Priority; streams of higher priority go first."""
        return self.request.priority

    @property
    def retained_bytes(self) -> int:
        """About how much memory it uses besides its state: request, tokens and log-probabilities.

        The outputs of a request share its prompt and lists, which count for the first one.
        """
        size = self.history.itemsize * len(self.history)
        size += len(self.logprobs) * _logprobs_bytes(self.request.sampling.logprobs)
        size += len(self.prompt_logprobs) * _logprobs_bytes(self.request.prompt_logprobs)
        size += len(self.prompt_bits) * NUMBER_BYTES
        if self.output:
            return size
        return size + self.request.prompt.tokens.nbytes + self.request.lists_bytes

    @property
    def expires_at(self) -> float:
        """When its time limit ends, on the monotonic clock."""
        limit = self.request.time_limit_s
        return float("inf") if limit is None else self.accepted_at + limit

    @property
    def to_prefill(self) -> int:
        """Number of prompt tokens to push before the stream can join the batch."""
        pushed = 0 if self.saved is None else self.saved.pushed
        return max(0, len(self.request.prompt) - pushed)

    def shares_prompt(self, other: Stream) -> bool:
        """Whether this stream can begin with a copy of the state of `other` after its prompt."""
        mine = self.request
        together = self.id == other.id and mine.prompt is other.request.prompt
        return together and self.saved is None and not mine.predicts_prompt

    def latest(self, size: int) -> array[int]:
        """The last `size` tokens of prompt and output, or fewer."""
        missing = size - len(self.history)
        if missing <= 0:
            return self.history[-size:]
        prompt = self.request.prompt.tokens[-missing:]
        return array(self.history.typecode, prompt.tolist()) + self.history

    @property
    def checkpoint(self) -> Checkpoint:
        """A checkpoint of the stream now, without the state."""
        finish = self.ending if isinstance(self.ending, Finish) else None
        return Checkpoint(
            self.history[:],
            None,
            finish,
            tuple(self.logprobs),
            self.base_tokens,
            self.base_characters,
            self._queued(self.started_at),
            self.first_token_at and self.first_token_at - self.accepted_at,
        )

    @property
    def backlog(self) -> Backlog | None:
        """The whole output so far, for a new subscriber; None if there is none."""
        if not (self.history or self.prompt_logprobs or self.ended):
            return None
        since = self.base_tokens
        text = self._full_text()[self.base_characters :]
        return Backlog(
            self.history[since:], text, self.logprobs[since:], tuple(self.prompt_logprobs)
        )

    def accept_token(
        self, token: int, now: float, logprobs: TokenLogprobs | None = None
    ) -> tuple[str, FinishReason | None]:
        """Add a drawn token. Returns the text that it completes, and why the stream ends, if so."""
        request, detokenizer = self.request, self.detokenizer
        self.generated += 1
        self.last_token = token
        if self.first_token_at is None:
            self.first_token_at = now
        text, final = "", token in self._final
        if not (final and request.is_unsent(token)):
            if self.keeps_history:
                self.history.append(token)
                if logprobs is not None:
                    self.logprobs.append(logprobs)
            text = detokenizer.push(token, self.generated > request.min_tokens)
        if detokenizer.matched is not None:
            return text, FinishReason.STOP
        if final:
            return text, FinishReason.STOP if token in request.stop_tokens else FinishReason.END
        complete_at = request.complete_at
        if complete_at is not None and len(request.prompt) + self.generated == complete_at:
            return text, FinishReason.END
        if self.grammar is not None and self.grammar.is_complete:
            return text, FinishReason.END
        if self.generated >= request.max_tokens:
            return text, FinishReason.MAX_TOKENS
        return text, None

    def finish(self, reason: FinishReason, state_bytes: int, now: float) -> Finish:
        """The record of a stream that ends now."""
        since = self.accepted_at
        return Finish(
            reason,
            self.detokenizer.matched,
            self.generated,
            self._queued(self.started_at or now) or 0.0,
            (self.first_token_at or now) - since,
            now - since,
            state_bytes,
        )

    def _queued(self, started_at: float | None) -> float | None:
        if self.queue_s is not None or started_at is None:
            return self.queue_s
        return started_at - self.accepted_at

    def _full_text(self) -> str:
        finish = self.ending if isinstance(self.ending, Finish) else None
        matched = None if finish is None else finish.stop
        detokenizer = self._new_detokenizer()
        text = detokenizer.replay(self.history, matched is not None)
        paused = finish is not None and finish.reason is FinishReason.PAUSED
        if self.ended and matched is None and not paused:
            text += detokenizer.flush()
        return text

    def _new_detokenizer(self) -> Detokenizer:
        request = self.request
        before = chain((request.prompt.start,), request.prompt.tokens)
        is_beginning = self._text.is_beginning(before)
        return Detokenizer(self._text, request.stop, request.include_stop, is_beginning)


def _logprobs_bytes(top: int | None) -> int:
    return _LOGPROBS_BYTES + _TOP_BYTES * (top or 0)
