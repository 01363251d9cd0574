"""The loop that makes progress: one thread per bundle, everything per step lives on it.

Other threads meet it in two places only: the inbox (`open`, `post`, `ask`), and the streams'
buffers, filled once a step through one wake-up of each event loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import psutil

from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.engine.admission import Ledger, Refusal, limits
from server.engine.decoding import Passes
from server.engine.events import Ending, Finish, FinishReason, HandedOver, Piece, outcome
from server.engine.kv_cache import Cache, Parked
from server.engine.placement import Places
from server.engine.sampling.logits_processors import Memory
from server.engine.scheduler import Load, Plan, next_credit, plan
from server.engine.stream import Stream
from server.errors import Displaced, EngineStopped, RequestError, StepFailed
from server.ops import metrics
from server.runtime.onnx_session import Runtime
from server.sessions.deliveries import Outbox
from server.sessions.subscriber import Reader
from server.sessions.table import Session, SessionTable
from server.snapshots.snapshots import Keeper

_log = logging.getLogger(__name__)
_IDLE_WAIT_S = 1.0


class Loop:
    """Runs the streams of one bundle."""

    def __init__(self, bundle: Bundle, config: EngineConfig, keeper: Keeper | None) -> None:
        self.bundle = bundle
        self.config = config
        self._keeper = keeper
        self.runtime = Runtime(bundle, config.slots + 1, config.threads, config.provider)
        self.cache = Cache(bundle, self.runtime, config.slots, config.prefix_cache_bytes)
        self._measures = metrics.EngineMetrics(bundle.name)
        self._measures.buffer_bytes(self.runtime.nbytes)
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._handing_over = False
        self._lock = threading.Lock()
        # What the streams not ended hold; changed under the lock, since both sides count.
        self.ledger = Ledger(bundle.manifest, limits(config, psutil.virtual_memory().total))
        self.places = Places(self.cache, config.stream_buffer)
        self.limited: set[Stream] = set()  # those with a time limit
        self.sessions = SessionTable()
        self._outbox = Outbox()
        self.passes = Passes(config, bundle, self.cache, self.places, self._outbox, self._measures)
        self._credit_s = 0.0
        self._thread = threading.Thread(target=self._run, name=f"engine-{bundle.name}", daemon=True)
        self._thread.start()

    # ---- called from any thread

    @property
    def alive(self) -> bool:
        """Whether it runs; once it does not, it never will again."""
        return self._thread.is_alive()

    def held_bytes(self, stream: Stream) -> int:
        """State that a stream holds outside any slot, or reserves by having one."""
        if stream.parked is not None:
            return sum(self.bundle.state_bytes(stream.parked.pushed).values())
        return 0 if stream.ended else self.bundle.max_state_bytes

    def require_room(self) -> None:
        """Raises Overloaded while not one more stream is taken on, and EngineStopped."""
        with self._lock:
            self._check_open(self._handing_over)
            self._heed(self.ledger.full(time.monotonic()))

    def open(self, session: Session) -> None:
        """Queue the streams of a session that have not ended, all or none.

        Raises Overloaded while there is no room, InvalidRequest if never, and EngineStopped.
        """
        opened = [stream for stream in session.streams if not stream.ended]
        with self._lock:
            self._check_open(self._handing_over)
            if opened:
                self._heed(self.ledger.admit(opened, time.monotonic()))
            before = self.sessions.add(session)
            self.post(lambda: self._enqueue(session, opened, before))

    def ask(self, action: Callable[[], None]) -> Future[None]:
        """Have `action` done as `post` does, and hear when it was. Raises EngineStopped.

        Not if the answer was cancelled before.
        """
        answer: Future[None] = Future()

        def act() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                action()
                answer.set_result(None)
            except Exception as error:
                answer.set_exception(error)

        with self._lock:
            self._check_open()
            self.post(act)
        return answer

    def hand_over(self) -> Future[None]:
        """Snapshot the durable sessions and end their readers; nothing is opened from then on.

        Raises EngineStopped.
        """
        self._handing_over = True
        return self.ask(self._hand_over)

    def post(self, action: Callable[[], None]) -> None:
        """Have `action` done on the loop's thread before the next step."""
        self._inbox.append(action)
        self._wake.set()

    def wake(self) -> None:
        """Look again at what there is to do."""
        self._wake.set()

    def close(self) -> None:
        """Stop. Streams that have not ended end with an error."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _heed(self, refusal: Refusal | None) -> None:
        if refusal is not None:
            self._measures.rejected(refusal.reason)
            raise refusal.error

    def _check_open(self, handing_over: bool = False) -> None:
        if self._closing or handing_over:
            raise EngineStopped("the server is shutting down; try another one, or again later")

    # ---- the thread's own, from here on

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
            self._hand_over()
        except Exception:
            _log.exception("the engine of %s died", self.bundle.name)
        with self._lock:  # whatever was not refused is in the inbox by now
            self._closing = True
        gone = EngineStopped("the model was taken down before the stream ended; try again later")
        while self._inbox:
            self._inbox.popleft()()
        for stream in [*self.places.waiting, *self.places.paused]:
            self._end(stream, gone)
        self._fail_batch(gone)
        self._publish()
        self._measures.closed(self.runtime.nbytes)

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
            self.passes.rest()
            self._wake.wait(self._until_next_expiry())
            self._wake.clear()

    def _load(self) -> Load:
        free, returning = self.cache.num_free, self.places.returning()
        yielding = self.places.yielding(returning)
        return Load(
            num_running=self.cache.num_running,
            num_free=free,
            yielding=tuple(s.priority for s in yielding),
            returning=tuple(s.priority for s in returning),
            waiting=self.places.head(free + len(yielding) + 1),
            bench=self.places.on_bench(),
            prefill_room=min(self.cache.block_room, self.config.prefill_chunk),
            prefill_credit_s=self._credit_s,
        )

    def _execute(self, todo: Plan) -> None:
        places = self.places
        if todo != Plan(decode=True) or len(places.running) > 1:
            self.passes.catch_up()
        if todo.preempt or todo.restore:
            returning = places.returning()
            for stream in places.yielding(returning)[: todo.preempt]:
                places.preempt(stream)
                self._measures.preempted()
            for stream in returning[: todo.restore]:
                places.restore(stream)
        for _ in range(todo.begin):
            self._start(places.begin())
        if todo.join:
            places.join()
        prefill_s = self._prefill(todo.prefill) if todo.prefill else 0.0
        if todo.seat and places.waiting[0].to_prefill:
            self._start(places.seat())
            self._measures.shared(self.cache.bench_pushed, self.cache.prefix_bytes)
        decode_s = self._decode() if todo.decode else 0.0
        share = self.config.prefill_share
        self._credit_s = next_credit(self._credit_s, share, prefill_s, decode_s)

    def _prefill(self, count: int) -> float:
        stream = self.places.bench
        assert stream is not None
        seconds, ending = self.passes.prefill(stream, count)
        if ending is not None:
            self._end(stream, ending)
        elif not stream.request.predicts_prompt and self._snapshot_is_due(
            stream, self.cache.bench_pushed
        ):
            self._take_snapshot(stream, self.cache.park_bench())
        return seconds

    def _decode(self) -> float:
        began, streams = time.perf_counter(), self.places.running
        ended = self.passes.decode()
        if self._keeper is not None:
            for stream, pushed in zip(streams, self.cache.pushed.tolist(), strict=True):
                if stream not in ended and self._snapshot_is_due(stream, pushed):
                    self._take_snapshot(stream, self.places.park(stream))
        for stream, ending in ended.items():
            self._end(stream, ending)
        for stream in [s for s in streams if s.unread >= self.config.stream_buffer]:
            self._pause_stream(stream)
        return time.perf_counter() - began

    # ---- the life of a stream

    def _enqueue(self, session: Session, streams: Sequence[Stream], before: Session | None) -> None:
        if before is not None:  # it goes on in this one
            for stream in [s for s in before.streams if not s.ended]:
                self._end(stream, Displaced("the same stream was begun again"))
            self.sessions.drop(before)
        for stream in session.streams:
            if not stream.reader.received.ended:
                self._catch_up(stream)
        for stream in streams:
            self.places.enqueue(stream)
        self.limited.update(s for s in streams if s.request.time_limit_s is not None)

    def _start(self, stream: Stream) -> None:
        """Work on a stream that waited begins, unless it had begun before."""
        if stream.started_at is not None:
            return
        with self._lock:
            self.ledger.began(stream)
        stream.started_at = time.monotonic()
        self._measures.started(stream.started_at - stream.accepted_at)
        request = stream.request
        if request.sampling.rules is not None:
            vocabulary = self.bundle.manifest.vocabulary
            stream.memory = Memory.of(request.sampling.rules, request.prompt, vocabulary)
            stream.memory.recall(np.array(stream.history, np.int64))

    def _end(self, stream: Stream, ending: Ending | None) -> None:
        """Take a stream out of wherever it is; `ending` is what its reader gets, if it has one."""
        self.places.remove(stream)
        self._settle(stream, ending)

    def _settle(self, stream: Stream, ending: Ending | None) -> None:
        """The books of a stream that is nowhere any more."""
        now = time.monotonic()
        with self._lock:
            self.ledger.ended(stream, now)
        stream.ended = True
        stream.ending = ending
        self.limited.discard(stream)
        self._measures.finished(outcome(ending), now - stream.accepted_at)
        if ending is not None:
            self._outbox.put(stream.reader, Piece(ending=ending))
        if not stream.is_kept:
            stream.parked = None
        elif isinstance(ending, Finish):
            self._take_snapshot(stream, stream.parked)
        session = self.sessions.of(stream)
        if session is not None and session.ended and not stream.is_kept:
            self.sessions.drop(session)

    def cancel(self, stream: Stream) -> None:
        """Drop a stream, unless it has ended."""
        if not stream.ended:
            self._end(stream, None)

    def _fail_batch(self, error: RequestError) -> None:
        """End every stream that the model was at work on, in whatever state a failure left them."""
        for stream in self.places.clear():
            self._settle(stream, error)

    def _expire(self, now: float) -> None:
        for stream in [s for s in self.limited if s.expires_at <= now]:
            rest = stream.text.flush()
            if rest:
                self._outbox.put(stream.reader, Piece(text=rest))
            self._stop(stream, FinishReason.TIME_LIMIT, now)
        for session in self.sessions.expired(now):
            self.forget(session)

    def _pause_stream(self, stream: Stream) -> None:
        """Give the slot of a stream whose reader lags to another; its state is copied anyway."""
        self.passes.catch_up()
        self.places.pause(stream)
        assert stream.parked is not None
        if stream.parked.pushed - stream.snapshot_at >= self.config.snapshot_interval:
            self._take_snapshot(stream, stream.parked)

    def _stop(self, stream: Stream, reason: FinishReason, now: float) -> None:
        """End a stream between two steps; one that is kept takes its state along."""
        self.passes.catch_up()
        pushed = self.places.pushed(stream)
        held = 0 if pushed is None else sum(self.bundle.state_bytes(pushed).values())
        if stream.is_kept:
            stream.parked = self.places.park(stream)
        self._end(stream, stream.finish(reason, held, now))

    # ---- sessions

    def attach(self, session: Session, readers: Sequence[Reader]) -> None:
        """Give a session new readers; those it had are sent away."""
        for stream, reader in zip(session.streams, readers, strict=True):
            if session.left_at is None:
                self._outbox.put(stream.reader, Piece(ending=Displaced("another reader came")))
            stream.reader = reader
            self._catch_up(stream)
        self.sessions.return_to(session)

    def _catch_up(self, stream: Stream) -> None:
        """Give a new reader what came before it."""
        reader = stream.reader
        if stream.history or stream.prompt_said or stream.ended:
            reader.published += max(0, len(stream.history) - stream.base_tokens)
            reader.published -= min(reader.published, reader.received.tokens)
            self._outbox.put(reader, Piece(backlog=stream.backlog))
        if stream.ended and stream.ending is not None:
            self._outbox.put(reader, Piece(ending=stream.ending))

    def leave(self, session: Session, readers: Sequence[Reader]) -> None:
        """These readers read no more: the session is kept, or its streams end."""
        if not self.sessions.holds(session) or session.readers != tuple(readers):
            return  # it is over, or another one reads
        if not session.terms.keep_s:
            for stream in session.streams:
                self.cancel(stream)
            return
        self.sessions.leave(session)
        for surplus in self.sessions.beyond(self.config.session_bytes, self.held_bytes):
            self.forget(surplus)

    def pause(self, session: Session) -> None:
        """Stop the streams of a session and keep their state."""
        for stream in [s for s in session.streams if not s.ended]:
            self._stop(stream, FinishReason.PAUSED, time.monotonic())

    def forget(self, session: Session) -> None:
        """End the streams of a session and drop all that is held of it."""
        for stream in session.streams:
            self.cancel(stream)
        self.sessions.drop(session)

    def _hand_over(self) -> None:
        if self._keeper is None or not self._keeper.is_durable:
            return
        self.passes.catch_up()
        for session in [s for s in self.sessions.all() if s.terms.keep_s]:
            for stream in [s for s in session.streams if not s.ended]:
                self._take_snapshot(stream, self.places.park(stream))
                self._end(stream, HandedOver())
            self.sessions.drop(session)

    def _snapshot_is_due(self, stream: Stream, pushed: int) -> bool:
        """Whether the stream, after a fold if it has any, is to be stored."""
        if self._keeper is None or not stream.is_kept:
            return False
        folded = not self.bundle.span or pushed % self.bundle.span == 0
        return folded and pushed - stream.snapshot_at >= self.config.snapshot_interval

    def _take_snapshot(self, stream: Stream, parked: Parked | None) -> None:
        """Store what the stream has behind it, off this thread."""
        if self._keeper is None or not stream.is_kept:
            return
        stream.snapshot_at = 0 if parked is None else parked.pushed
        past = replace(stream.past, parked=parked)
        output = stream.request.sampling.output
        self._keeper.offer(self.bundle, stream.terms, output, past)

    def _until_next_expiry(self) -> float:
        limited = min((stream.expires_at for stream in self.limited), default=float("inf"))
        soonest = min(limited, self.sessions.soonest_expiry)
        return max(0.0, min(_IDLE_WAIT_S, soonest - time.monotonic()))

    # ---- what leaves the thread

    def _publish(self) -> None:
        gone = self._outbox.publish()
        for session in self.sessions.all() if gone else ():
            if gone.intersection(session.readers):
                self.leave(session, session.readers)

    def _measure(self, idle: bool) -> None:
        if idle or self._measures.are_due(time.monotonic()):
            self._measures.holding(
                len(self.places.running),
                len(self.places.waiting),
                len(self.places.paused),
                self.cache.state_bytes(),
            )
            self._measures.promising(self.ledger.held.state_bytes)
