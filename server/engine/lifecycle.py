"""The steps in a stream's life on the engine's thread: queue, start, pause, stop, end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from server.bundles.bundle import Bundle
from server.checkpoint import Finish, FinishReason, SavedState
from server.config import EngineConfig
from server.engine.admission import Ledger
from server.engine.decoding import Decoding
from server.engine.interfaces import SnapshotStore, StreamHolder
from server.engine.placement import Placement
from server.engine.sampling.grammar_state import GrammarState
from server.engine.sampling.logits_processors import PenaltyState
from server.engine.stream import Stream
from server.engine.updates import Ending, StreamUpdate, outcome
from server.errors import RequestError, StepFailed
from server.lazy_heap import LazyHeap
from server.ops.engine_metrics import EngineMetrics, Lived
from server.ops.metrics import SNAPSHOT_FAILURES

_log = logging.getLogger(__name__)


class StreamLifecycle:
    """Changes the phase of an engine's streams. All methods run on the engine's thread.

    limited: the streams with a time limit. lock: held while the ledger changes, since other threads
    admit streams.
    """

    def __init__(
        self,
        bundle: Bundle,
        config: EngineConfig,
        placement: Placement,
        decoding: Decoding,
        ledger: Ledger,
        lock: threading.Lock,
        metrics: EngineMetrics,
        snapshots: SnapshotStore | None,
    ) -> None:
        self.holder: StreamHolder | None = None
        self.limited = LazyHeap[Stream]()
        self._bundle = bundle
        self._config = config
        self._placement = placement
        self._decoding = decoding
        self._ledger = ledger
        self._lock = lock
        self._metrics = metrics
        self._snapshots = snapshots

    def enqueue(self, stream: Stream) -> None:
        """Put an admitted stream into the queue."""
        self._placement.enqueue(stream)
        if stream.request.time_limit_s is not None:
            self.limited.put(stream, stream.expires_at)

    def start(self, stream: Stream) -> None:
        """Record that work on a stream begins. Does nothing if it had begun before."""
        if stream.started_at is not None:
            return
        with self._lock:
            self._ledger.began(stream)
        stream.started_at = time.monotonic()
        self._metrics.started(stream.started_at - stream.accepted_at)
        request, text = stream.request, self._bundle.codec.text
        stream.grammar = GrammarState.of(request, text)
        if stream.grammar is not None:
            stream.grammar.push(stream.history)
        if request.sampling.processors is not None:
            vocabulary = self._bundle.vocabulary
            processors = request.sampling.processors
            stream.penalties = PenaltyState.of(processors, request.prompt, vocabulary, text)
            stream.penalties.recall(np.array(stream.history, np.int64))

    @contextmanager
    def placing(self, stream: Stream) -> Iterator[None]:
        """Do something with one stream. If that raises, the stream ends and the others go on."""
        try:
            yield
        except Exception:
            _log.exception("a stream of %s could not be placed", self._bundle.name)
            self.end(stream, StepFailed("the stream could not be placed; see the server's log"))

    def pause_lagging(self, stream: Stream) -> None:
        """Park a stream whose reader lags, so that its slot is free for another."""
        self._decoding.commit()
        self._placement.pause(stream)
        # The state is copied here in any case, so a snapshot costs little.
        assert stream.saved is not None
        if stream.saved.pushed - stream.snapshot_at >= self._config.snapshot_interval:
            self.snapshot(stream, stream.saved)

    def stop(self, stream: Stream, reason: FinishReason) -> None:
        """End a stream between two steps. The state of a kept stream is saved, if it can be."""
        self._commit()
        if stream.ended:
            return
        pushed = self._placement.pushed(stream)
        held = 0 if pushed is None else sum(self._bundle.state_bytes(pushed).values())
        if stream.is_kept:
            stream.saved = self._placement.try_save(stream)
        self.end(stream, stream.finish(reason, held, time.monotonic()))

    def end(self, stream: Stream, ending: Ending | None) -> None:
        """Remove a stream from the engine and send its subscriber the `ending`, if there is one.

        Does nothing if it has ended.
        """
        if not stream.ended:
            self._vacate(stream)
            self._settle(stream, ending)

    def cancel(self, stream: Stream) -> None:
        """End a stream without an ending. Does nothing if it has ended."""
        self.end(stream, None)

    def fail_batch(self, error: RequestError) -> None:
        """End the streams of the batch and the prefill slot with `error`. Their states are lost."""
        for stream in self._placement.clear():
            self._settle(stream, error)

    def fail_pass(self, prefilling: Stream | None = None) -> None:
        """End the streams of a pass that raised just now: `prefilling`, or those of the batch.

        The state of the batch is lost, and with it that of the prefill slot.
        """
        _log.exception("a pass of %s failed", self._bundle.name)
        failed = StepFailed("the model failed on this step; see the server's log")
        if prefilling is not None:
            self.end(prefilling, failed)
        else:
            self.fail_batch(failed)

    def fail_all(self, error: RequestError) -> None:
        """End all streams with `error`."""
        for stream in [*self._placement.waiting, *self._placement.paused]:
            self.end(stream, error)
        self.fail_batch(error)

    def expire(self, now: float) -> None:
        """End the streams whose time limit is over at `now`."""
        while self.limited.first_key <= now:
            stream = self.limited.pop()
            with self.placing(stream):
                if rest := stream.detokenizer.flush():
                    stream.subscriber.put(StreamUpdate(text=rest))
                self.stop(stream, FinishReason.TIME_LIMIT)

    @property
    def next_expiry(self) -> float:
        """When the next time limit ends, on the monotonic clock."""
        return self.limited.first_key

    def hand_over(self, stream: Stream, ending: Ending) -> None:
        """Store a stream's checkpoint and end it here, so that another server can continue it."""
        self._commit()
        if not stream.ended:
            self.snapshot(stream, self._placement.try_save(stream))
            self.end(stream, ending)

    @property
    def takes_snapshots(self) -> bool:
        """Whether there is a snapshot store."""
        return self._snapshots is not None

    def snapshot_if_due(self, stream: Stream, pushed: int) -> None:
        """Take a snapshot if a block has just folded and `snapshot_interval` tokens have passed."""
        if self._snapshots is None or not stream.is_kept:
            return
        folded = not self._bundle.span or pushed % self._bundle.span == 0
        if folded and pushed - stream.snapshot_at >= self._config.snapshot_interval:
            saved = self._placement.try_save(stream)
            if saved is not None:  # else an older one is stored, and this is tried again later
                self.snapshot(stream, saved)

    def snapshot(self, stream: Stream, saved: SavedState | None) -> None:
        """Have a stream's checkpoint stored, with the `saved` state, on another thread.

        One that cannot be taken is counted and logged.
        """
        if self._snapshots is None or not stream.is_kept:
            return
        try:
            checkpoint = replace(stream.checkpoint, saved=saved)
            self._snapshots.offer(self._bundle, stream.lease, stream.output, checkpoint)
            stream.snapshot_at = 0 if saved is None else saved.pushed
        except Exception:
            SNAPSHOT_FAILURES.inc()
            _log.exception("a snapshot of %s could not be taken", self._bundle.name)

    def _commit(self) -> None:
        """Push the uncommitted tokens. If that raises, the batch ends."""
        try:
            self._decoding.commit()
        except Exception:
            self.fail_pass()

    def _vacate(self, stream: Stream) -> None:
        """Take a stream out of its place.

        The last stream of the batch moves into its row; if it cannot, it ends with an error.
        """
        while True:
            try:
                return self._placement.remove(stream)
            except Exception:
                _log.exception("a stream of %s could not be placed", self._bundle.name)
            last = self._placement.running[-1]
            self._placement.remove(last)  # nothing moves into the last row
            unplaced = StepFailed("the stream could not be placed; see the server's log")
            self._settle(last, unplaced)

    def _settle(self, stream: Stream, ending: Ending | None) -> None:
        """Record the end of a stream that is in no place any more."""
        now = time.monotonic()
        with self._lock:
            self._ledger.ended(stream, now)
        stream.ended, stream.ending = True, ending
        stream.penalties = stream.grammar = None
        self.limited.discard(stream)
        self._metrics.finished(outcome(ending), _lived(stream, now))
        if ending is not None:
            stream.subscriber.put(StreamUpdate(ending=ending))
        if not stream.is_kept:
            stream.saved = None
        elif isinstance(ending, Finish):
            self.snapshot(stream, stream.saved)
        if self.holder is not None:
            self.holder.ended(stream)


def _lived(stream: Stream, now: float) -> Lived:
    since = stream.accepted_at
    started, first = stream.started_at, stream.first_token_at
    return Lived(
        total_s=now - since,
        started_s=None if started is None else started - since,
        first_token_s=None if first is None else first - since,
        prompt_tokens=len(stream.request.prompt),
        generated=stream.generated,
        preemptions=stream.preemptions,
    )
