"""The loop that makes progress: one thread per bundle, everything per step lives on it.

Event loops and the engine meet in two places only: the inbox (`submit`, `cancel`, `caught_up`) and
the streams' buffers, filled once a step through one wake-up of each loop.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import islice

import numpy as np

from server import metrics
from server.bundle import Bundle
from server.cache import Cache
from server.config import EngineConfig
from server.errors import EngineStopped, Overloaded, RequestError, StepFailed
from server.logit_rules import Memory
from server.logprobs import TokenLogprobs, surprisal, token_logprobs
from server.outbox import Outbox
from server.runtime import Floats, Runtime
from server.sampler import SamplingBatch, failures, sample
from server.scheduler import Load, Plan, next_credit, plan
from server.stream import (
    Ending,
    Event,
    FinishReason,
    Piece,
    Request,
    Scored,
    Stream,
    events,
    outcome,
)

_log = logging.getLogger(__name__)
_IDLE_WAIT_S = 1.0


class Engine:
    """Generates streams from one bundle. Its methods may be called from any event loop."""

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        self.bundle = bundle
        self.config = config
        self._runtime = Runtime(bundle, config.slots + 1, config.threads, config.provider)
        self._cache = Cache(bundle, self._runtime, config.slots, config.prefix_cache_bytes)
        self._measures = metrics.EngineMetrics(bundle.name)
        self._measures.buffer_bytes(self._runtime.nbytes)
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._lock = threading.Lock()
        self._num_open = 0  # streams not ended; written under the lock, since both sides count
        self._waiting: deque[Stream] = deque()
        self._bench: Stream | None = None
        self._running: list[Stream] = []
        self._sampling: SamplingBatch | None = None  # of the batch as it is, None when it changed
        self._paused: list[Stream] = []
        self._limited: set[Stream] = set()
        self._outbox = Outbox()
        self._credit_s = 0.0
        self._last_step_at: float | None = None
        self._thread = threading.Thread(target=self._run, name=f"engine-{bundle.name}", daemon=True)
        self._thread.start()

    # ---- called from event loops

    @property
    def alive(self) -> bool:
        """Whether the loop runs; once it does not, it never will again."""
        return self._thread.is_alive()

    def submit(self, request: Request) -> Stream:
        """Queue a stream that the running event loop will read.

        Raises Overloaded when the queue is full, EngineStopped when nothing will be served.
        """
        return self.submit_together([request])[0]

    def submit_together(self, requests: Sequence[Request]) -> tuple[Stream, ...]:
        """Queue streams, all or none, that the running event loop reads with `events_together`.

        Those with the same prompt array wait for one prefill of it. Raises as `submit` does.
        """
        name, arrived = secrets.token_urlsafe(16), asyncio.Event()
        loop = asyncio.get_running_loop()
        streams = tuple(Stream(name, request, loop, arrived) for request in requests)
        limit = self.config.slots + self.config.queue_limit
        with self._lock:
            if self._closing:
                raise EngineStopped("the server is shutting down; try another one, or again later")
            if self._num_open + len(streams) > limit:
                self._measures.rejected("queue_full")
                raise Overloaded(
                    f"{self._num_open} streams of {self.bundle.name} are running or waiting, the "
                    f"limit is {limit} ({self.config.slots} slots and a queue of "
                    f"{self.config.queue_limit}); try again later",
                    retry_after_s=1.0,
                )
            self._num_open += len(streams)
            self._post(lambda: self._enqueue(streams))
        return streams

    def cancel(self, stream: Stream) -> None:
        """Drop a stream; its slot is free before the next step. Does nothing once it has ended."""
        self._post(lambda: self._cancel(stream))

    async def events(self, stream: Stream) -> AsyncIterator[Event]:
        """What happens to `stream`, in order; the last event is its ending."""
        async for _, event in self.events_together([stream]):
            yield event

    async def events_together(
        self, streams: Sequence[Stream]
    ) -> AsyncIterator[tuple[Stream, Event]]:
        """What happens to streams that were submitted together, each in its order."""
        async for stream, event in events(streams):
            if stream.paused:
                self._wake.set()
            yield stream, event

    def close(self) -> None:
        """Stop the loop. Streams that have not ended end with an error."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _post(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        self._wake.set()

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        except Exception:
            _log.exception("the engine of %s died", self.bundle.name)
        with self._lock:  # whatever was not refused is in the inbox by now
            self._closing = True
        gone = EngineStopped("the server shut down before the stream ended; try again later")
        while self._inbox:
            self._inbox.popleft()()
        for stream in [*self._waiting, *self._paused]:
            self._end(stream, gone)
        self._fail_batch(gone)
        self._publish()

    def _turn(self) -> None:
        while self._inbox:
            self._inbox.popleft()()
        self._expire(time.monotonic())
        todo = plan(self._load())
        try:
            self._execute(todo)
        except Exception:
            _log.exception("a pass of %s failed", self.bundle.name)
            self._fail_batch(StepFailed("the model failed on this step; see the server's log"))
        self._publish()
        self._measure(todo.idle)
        if todo.idle:
            self._last_step_at = None
            self._wake.wait(self._until_next_expiry())
            self._wake.clear()

    def _load(self) -> Load:
        bench = self._bench
        head = islice(self._waiting, self._cache.num_free + 1)
        return Load(
            num_running=self._cache.num_running,
            num_free=self._cache.num_free,
            num_returning=len(self._returning()),
            waiting=tuple((s.to_prefill, not s.request.score) for s in head),
            bench_left=None if bench is None else len(bench.unpushed(self._cache.bench_pushed)),
            bench_joins=bench is not None and not bench.request.score,
            prefill_room=min(self._cache.block_room, self.config.prefill_chunk),
            prefill_credit_s=self._credit_s,
        )

    def _execute(self, todo: Plan) -> None:
        for stream in self._returning()[: todo.restore]:
            self._restore(stream)
        for _ in range(todo.begin):
            self._begin(self._waiting[0])
            self._start(self._waiting.popleft())
        if todo.join:
            assert self._bench is not None
            self._share(self._bench, self._cache.join())
            self._join_batch(self._bench)
            self._bench = None
        prefill_s = self._prefill(todo.prefill) if todo.prefill else 0.0
        if todo.seat and self._waiting[0].parked is None:
            self._start(stream := self._waiting.popleft())
            # Where the prompt itself is predicted, every token of it has to be pushed.
            self._cache.seat(None if stream.request.predicts_prompt else stream.unpushed(0))
            self._measures.shared(self._cache.bench_pushed, self._cache.prefix_bytes)
            self._bench = stream
        decode_s = self._decode() if todo.decode else 0.0
        share = self.config.prefill_share
        self._credit_s = next_credit(self._credit_s, share, prefill_s, decode_s)

    def _prefill(self, count: int) -> float:
        stream = self._bench
        assert stream is not None
        began = time.perf_counter()
        first = self._cache.bench_pushed
        request = stream.request
        logits = self._cache.prefill(stream.unpushed(first)[:count], request.predicts_prompt)
        seconds = time.perf_counter() - began
        self._measures.prefilled(count, seconds)
        self._measures.folded(int(self._cache.block_room == self.bundle.span))
        if request.predicts_prompt:
            self._predict_prompt(stream, logits, first)
        return seconds

    def _predict_prompt(self, stream: Stream, logits: Floats, first: int) -> None:
        """Report or score the tokens that `logits` predicted, the prompt's from `first` on."""
        request = stream.request
        targets = request.prompt[first + 1 :][: len(logits)]
        failed = failures(logits, targets, first + np.arange(len(logits)))
        if failed:
            self._end(stream, failed[min(failed)])
            return
        if request.prompt_logprobs is not None:
            said = token_logprobs(logits, targets, [request.prompt_logprobs] * len(targets))
            self._outbox.put(stream, Piece(prompt=said))
        if request.score:
            stream.bits += surprisal(logits, targets).tolist()
            if not len(stream.unpushed(self._cache.bench_pushed)):
                self._end(stream, Scored(tuple(stream.bits)))

    def _decode(self) -> float:
        streams = self._running
        if self._sampling is None:
            self._sampling = SamplingBatch.of(
                [s.request.sampling for s in streams], [s.memory for s in streams]
            )
        began = time.perf_counter()
        logits = self._cache.step(np.array([s.last_token for s in streams], np.int64))
        positions = self._cache.pushed - 1
        tokens = sample(logits, self._sampling, positions)
        self._sampling.remember(tokens)
        logprobs = self._sampling.logprobs(logits, tokens)
        now, perf = time.monotonic(), time.perf_counter()
        ended: dict[int, Ending] = {**failures(logits, tokens, positions)}
        for row, (stream, token) in enumerate(zip(streams, tokens.tolist(), strict=True)):
            if row not in ended:
                reason = self._take_token(stream, token, logprobs.get(row), now)
                if reason is not None:
                    sizes = self.bundle.state_bytes(int(self._cache.pushed[row]))
                    ended[row] = stream.finish(reason, sum(sizes.values()), now)
        self._measures.folded(self._cache.fold(ended.keys()))
        self._measures.stepped(
            len(streams), perf - began, self._last_step_at and perf - self._last_step_at
        )
        self._last_step_at = perf
        for row in sorted(ended, reverse=True):
            self._end(streams[row], ended[row])
        for stream in [s for s in self._running if s.unread >= self.config.stream_buffer]:
            self._pause(stream)
        return time.perf_counter() - began

    def _take_token(
        self, stream: Stream, token: int, logprobs: TokenLogprobs | None, now: float
    ) -> FinishReason | None:
        first = stream.first_token_at is None
        text, reason = stream.accept_token(token, now)
        if first:
            self._measures.first_token(now - stream.accepted_at)
        if reason is not None and stream.text.matched is None:
            text += stream.text.flush()
        if stream.request.is_unsent(token):
            self._outbox.put(stream, Piece(text=text))
        else:
            stream.published += 1
            self._outbox.put(stream, Piece(token, text, logprobs))
        return reason

    # ---- where streams are

    def _enqueue(self, streams: Sequence[Stream]) -> None:
        self._waiting += streams
        self._limited.update(s for s in streams if s.request.time_limit_s is not None)

    def _start(self, stream: Stream) -> None:
        """Work on a stream that waited begins."""
        stream.started_at = time.monotonic()
        self._measures.started(stream.started_at - stream.accepted_at)
        request = stream.request
        if request.sampling.rules is not None:
            vocabulary = self.bundle.manifest.vocabulary
            stream.memory = Memory.of(request.sampling.rules, request.prompt, vocabulary)

    def _begin(self, stream: Stream) -> None:
        """Put a stream that has nothing to prefill, or no longer has, into the batch."""
        if stream.parked is None:
            self._cache.begin()
        else:
            self._cache.restore(stream.parked)
            stream.parked = None
        self._join_batch(stream)

    def _share(self, stream: Stream, row: int) -> None:
        """Give the other outputs of a request the state that its prompt left in `row`."""
        siblings = [s for s in self._waiting if s.shares_prompt(stream)]
        if siblings:
            parked = self._cache.park(row)
            for sibling in siblings:
                sibling.parked = parked

    def _join_batch(self, stream: Stream) -> None:
        self._running.append(stream)
        self._sampling = None

    def _leave_batch(self, stream: Stream) -> None:
        row = self._running.index(stream)
        moved = self._cache.leave(row)
        last = self._running.pop()
        if moved is not None:
            self._running[row] = last
        self._sampling = None

    def _pause(self, stream: Stream) -> None:
        """Park a stream whose reader lags; it comes back when half of its buffer is read."""
        stream.parked = self._cache.park(self._running.index(stream))
        self._leave_batch(stream)
        self._paused.append(stream)
        stream.paused = True

    def _returning(self) -> list[Stream]:
        return [s for s in self._paused if s.unread <= self.config.stream_buffer // 2]

    def _restore(self, stream: Stream) -> None:
        self._begin(stream)
        stream.paused = False
        self._paused.remove(stream)

    def _end(self, stream: Stream, ending: Ending | None) -> None:
        """Take a stream out of wherever it is; `ending` is what its reader gets, if it has one."""
        if stream in self._running:
            self._leave_batch(stream)
        elif stream is self._bench:
            self._bench = None
        elif stream in self._paused:
            self._paused.remove(stream)
        else:
            self._waiting.remove(stream)
        self._settle(stream, ending)

    def _settle(self, stream: Stream, ending: Ending | None) -> None:
        """The books of a stream that is nowhere any more."""
        with self._lock:
            self._num_open -= 1
        stream.ended = True
        stream.parked = None
        self._limited.discard(stream)
        self._measures.finished(outcome(ending), time.monotonic() - stream.accepted_at)
        if ending is not None:
            self._outbox.put(stream, Piece(ending=ending))

    def _cancel(self, stream: Stream) -> None:
        if not stream.ended:
            self._end(stream, None)

    def _fail_batch(self, error: RequestError) -> None:
        """End every stream that the model was at work on, in whatever state a failure left them."""
        streams = [*self._running, *([self._bench] if self._bench else [])]
        self._running, self._bench, self._sampling = [], None, None
        self._cache.clear()
        for stream in streams:
            self._settle(stream, error)

    def _expire(self, now: float) -> None:
        for stream in [s for s in self._limited if s.expires_at <= now]:
            rest = stream.text.flush()
            if rest:
                self._outbox.put(stream, Piece(text=rest))
            held = self._state_bytes(stream)
            self._end(stream, stream.finish(FinishReason.TIME_LIMIT, held, now))

    def _state_bytes(self, stream: Stream) -> int:
        """State that a stream holds now, wherever it is."""
        if stream in self._running:
            pushed = int(self._cache.pushed[self._running.index(stream)])
        elif stream is self._bench:
            pushed = self._cache.bench_pushed
        elif stream.parked is not None:
            pushed = stream.parked.pushed
        else:
            return 0
        return sum(self.bundle.state_bytes(pushed).values())

    def _until_next_expiry(self) -> float:
        soonest = min((s.expires_at for s in self._limited), default=float("inf"))
        return max(0.0, min(_IDLE_WAIT_S, soonest - time.monotonic()))

    # ---- what leaves the thread

    def _publish(self) -> None:
        for stream in self._outbox.publish():
            self._cancel(stream)

    def _measure(self, idle: bool) -> None:
        if idle or self._measures.are_due(time.monotonic()):
            self._measures.holding(
                len(self._running), len(self._waiting), len(self._paused), self._cache.state_bytes()
            )
