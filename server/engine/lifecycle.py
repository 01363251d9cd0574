"""The life of a stream on the engine's thread: queued, started, paused, stopped, ended."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np

from server.bundles.bundle import Bundle
from server.checkpoint import Finish, FinishReason, SavedState
from server.config import EngineConfig
from server.engine.admission import Ledger
from server.engine.decoding import Decoding
from server.engine.interfaces import SnapshotStore, StreamHolder
from server.engine.placement import Placement
from server.engine.sampling.logits_processors import PenaltyState
from server.engine.stream import Stream
from server.engine.updates import Ending, StreamUpdate, outcome
from server.errors import RequestError
from server.ops.metrics import EngineMetrics


class StreamLifecycle:
    """What can happen to the streams of an engine. All of it happens on the engine's thread.

    lock: held while the ledger changes, since other threads admit streams.
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
        self.limited: set[Stream] = set()  # those with a time limit
        self._bundle = bundle
        self._config = config
        self._placement = placement
        self._decoding = decoding
        self._ledger = ledger
        self._lock = lock
        self._metrics = metrics
        self._snapshots = snapshots

    def enqueue(self, stream: Stream) -> None:
        """A stream that was admitted waits for its turn."""
        self._placement.enqueue(stream)
        if stream.request.time_limit_s is not None:
            self.limited.add(stream)

    def start(self, stream: Stream) -> None:
        """Work on a stream that waited begins, unless it had begun before."""
        if stream.started_at is not None:
            return
        with self._lock:
            self._ledger.began(stream)
        stream.started_at = time.monotonic()
        self._metrics.started(stream.started_at - stream.accepted_at)
        request = stream.request
        if request.sampling.processors is not None:
            vocabulary = self._bundle.vocabulary
            processors = request.sampling.processors
            stream.penalties = PenaltyState.of(processors, request.prompt, vocabulary)
            stream.penalties.recall(np.array(stream.history, np.int64))

    def pause_lagging(self, stream: Stream) -> None:
        """Give the slot of a stream whose reader lags to another; its state is copied anyway."""
        self._decoding.commit()
        self._placement.pause(stream)
        assert stream.saved is not None
        if stream.saved.pushed - stream.snapshot_at >= self._config.snapshot_interval:
            self.snapshot(stream, stream.saved)

    def stop(self, stream: Stream, reason: FinishReason) -> None:
        """End a stream between two steps; one that is kept takes its state along."""
        self._decoding.commit()
        pushed = self._placement.pushed(stream)
        held = 0 if pushed is None else sum(self._bundle.state_bytes(pushed).values())
        if stream.is_kept:
            stream.saved = self._placement.save(stream)
        self.end(stream, stream.finish(reason, held, time.monotonic()))

    def end(self, stream: Stream, ending: Ending | None) -> None:
        """Take a stream out of wherever it is, and give its subscriber the `ending`, if any."""
        self._placement.remove(stream)
        self._settle(stream, ending)

    def cancel(self, stream: Stream) -> None:
        """Drop a stream, unless it has ended."""
        if not stream.ended:
            self.end(stream, None)

    def fail_batch(self, error: RequestError) -> None:
        """End every stream that the model was at work on, in whatever state a failure left them."""
        for stream in self._placement.clear():
            self._settle(stream, error)

    def fail_all(self, error: RequestError) -> None:
        """End every stream there is."""
        for stream in [*self._placement.waiting, *self._placement.paused]:
            self.end(stream, error)
        self.fail_batch(error)

    def expire(self, now: float) -> None:
        """End the streams whose time limit is over."""
        for stream in [s for s in self.limited if s.expires_at <= now]:
            if rest := stream.detokenizer.flush():
                stream.subscriber.put(StreamUpdate(text=rest))
            self.stop(stream, FinishReason.TIME_LIMIT)

    @property
    def next_expiry(self) -> float:
        """When the next time limit is over, on the monotonic clock."""
        return min((stream.expires_at for stream in self.limited), default=float("inf"))

    def hand_over(self, stream: Stream, ending: Ending) -> None:
        """Store how far a stream is and end it here, so that another server goes on with it."""
        self._decoding.commit()
        self.snapshot(stream, self._placement.save(stream))
        self.end(stream, ending)

    @property
    def takes_snapshots(self) -> bool:
        """Whether anything is stored of any stream."""
        return self._snapshots is not None

    def snapshot_if_due(self, stream: Stream, pushed: int) -> None:
        """Store how far a stream is, when it has folded and the last time was long enough ago."""
        if self._snapshots is None or not stream.is_kept:
            return
        folded = not self._bundle.span or pushed % self._bundle.span == 0
        if folded and pushed - stream.snapshot_at >= self._config.snapshot_interval:
            self.snapshot(stream, self._placement.save(stream))

    def snapshot(self, stream: Stream, saved: SavedState | None) -> None:
        """Store how far a stream is, off this thread."""
        if self._snapshots is None or not stream.is_kept:
            return
        stream.snapshot_at = 0 if saved is None else saved.pushed
        checkpoint = replace(stream.checkpoint, saved=saved)
        self._snapshots.offer(self._bundle, stream.lease, stream.output, checkpoint)

    def _settle(self, stream: Stream, ending: Ending | None) -> None:
        """Close the books of a stream that is in no place any more."""
        now = time.monotonic()
        with self._lock:
            self._ledger.ended(stream, now)
        stream.ended, stream.ending = True, ending
        self.limited.discard(stream)
        self._metrics.finished(outcome(ending), now - stream.accepted_at)
        if ending is not None:
            stream.subscriber.put(StreamUpdate(ending=ending))
        if not stream.is_kept:
            stream.saved = None
        elif isinstance(ending, Finish):
            self.snapshot(stream, stream.saved)
        if self.holder is not None:
            self.holder.ended(stream)
