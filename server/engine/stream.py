"""One output of a request, as the engine's thread sees it: how far it is, and what it has said."""

from __future__ import annotations

import time
from array import array
from collections import deque

from server.checkpoint import Checkpoint, Finish, FinishReason, SavedState, TokenLogprobs
from server.engine.detokenizer import Detokenizer
from server.engine.interfaces import Subscriber
from server.engine.sampling.logits_processors import PenaltyState
from server.engine.updates import Backlog, Ending
from server.request import Lease, Request


class Stream:
    """A stream that has not begun; `server.engine.restore` makes one that goes on.

    typecode: how `array.array` keeps its tokens. Touched by the engine's thread alone, once the
    engine has it.
    """

    def __init__(
        self, lease: Lease, request: Request, subscriber: Subscriber, typecode: str
    ) -> None:
        self.lease = lease
        self.request = request
        self.subscriber = subscriber
        elapsed = time.time() - lease.accepted_at if lease.accepted_at else 0.0
        self.accepted_at = time.monotonic() - elapsed
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.queue_s: float | None = None  # from acceptance to start, if that was before a restore
        self.queue_key = (-request.priority, 0)  # its order, once its arrival is counted
        self.paused = False
        self.ended = False
        self.ending: Ending | None = None
        # What it has said. Tokens before `base_tokens` were said before it last went on.
        self.history = array(typecode)
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.detokenizer = Detokenizer(request.stop, request.include_stop)
        self.base_tokens = self.base_characters = 0
        self.remembers = lease.keep_s > 0
        # Where the model is with it.
        self.generated = 0
        self.last_token = request.prompt.last
        self.saved: SavedState | None = None
        self.snapshot_at = 0  # tokens that the last snapshot's state had seen
        self.replay_tokens: deque[int] = deque()  # drawn once already, whose state is lost
        self.uncommitted: list[int] = []  # before the last token, not yet in the state
        self.penalties: PenaltyState | None = None
        self.prompt_bits: list[float] = []

    @property
    def id(self) -> str:
        """Name of the stream, which all outputs of a request share."""
        return self.lease.stream_id

    @property
    def output(self) -> int:
        """Index among the outputs of its request."""
        return self.request.sampling.output

    @property
    def is_kept(self) -> bool:
        """Whether the stream outlives its subscriber."""
        return self.lease.keep_s > 0

    @property
    def priority(self) -> int:
        """Streams of a higher priority go first."""
        return self.request.priority

    @property
    def expires_at(self) -> float:
        """When its time limit ends, on the monotonic clock."""
        limit = self.request.time_limit_s
        return float("inf") if limit is None else self.accepted_at + limit

    @property
    def to_prefill(self) -> int:
        """Tokens of the prompt to push before the stream can join the batch."""
        pushed = 0 if self.saved is None else self.saved.pushed
        return max(0, len(self.request.prompt) - pushed)

    def shares_prompt(self, other: Stream) -> bool:
        """Whether the state that `other` has after its prompt is all that this one needs."""
        mine = self.request
        together = self.id == other.id and mine.prompt is other.request.prompt
        return together and self.saved is None and not mine.predicts_prompt

    def latest(self, size: int) -> array[int]:
        """Its last tokens of prompt and output, at most `size`, as far as they are remembered."""
        missing = size - len(self.history)
        if missing <= 0:
            return self.history[-size:]
        prompt = self.request.prompt.tokens[-missing:]
        return array(self.history.typecode, prompt.tolist()) + self.history

    @property
    def checkpoint(self) -> Checkpoint:
        """A copy of how far it is now, without the state."""
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
        """What a new subscriber may have missed; None before anything has happened."""
        if not (self.history or self.prompt_logprobs or self.ended):
            return None
        since = self.base_tokens
        text = self._everything_said()[self.base_characters :]
        return Backlog(
            self.history[since:], text, self.logprobs[since:], tuple(self.prompt_logprobs)
        )

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
                    self.logprobs.append(logprobs)
            if request.complete_at is None:
                text = self.detokenizer.push(token, self.generated > request.min_tokens)
        if token in request.stop_tokens or self.detokenizer.matched is not None:
            return text, FinishReason.STOP
        if token == request.end_token:
            return text, FinishReason.END
        if len(request.prompt) + self.generated == request.complete_at:
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

    def _everything_said(self) -> str:
        if self.request.complete_at is not None:
            return ""
        finish = self.ending if isinstance(self.ending, Finish) else None
        matched = None if finish is None else finish.stop
        detokenizer = Detokenizer(self.request.stop, self.request.include_stop)
        text = detokenizer.replay(bytes(self.history.tolist()), matched)
        paused = finish is not None and finish.reason is FinishReason.PAUSED
        if self.ended and matched is None and not paused:
            text += detokenizer.flush()
        return text
