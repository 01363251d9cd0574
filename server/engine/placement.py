"""The places of an engine's streams: the queue, the prefill slot, the batch, or paused.

The state moves with the stream: a stream of the batch has a row of the cache, a parked one has a
saved state. A move that raises leaves the stream where it was.
"""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Sequence
from itertools import count
from math import inf
from operator import attrgetter

from server.checkpoint import SavedState
from server.engine.kv_cache import Cache
from server.engine.sampling.sampler import SamplingBatch
from server.engine.scheduler import Prefilling, Waiting
from server.engine.stream import Stream
from server.ops.metrics import SNAPSHOT_FAILURES

_log = logging.getLogger(__name__)
_QUEUE_KEY = attrgetter("queue_key")


class Placement:
    """The queue, the prefill slot, the batch, and the streams whose readers lag."""

    def __init__(self, cache: Cache, stream_buffer: int) -> None:
        self._cache = cache
        self._stream_buffer = stream_buffer
        self._arrivals = count()
        self._sampling: SamplingBatch | None = None  # None after a change of the batch
        self.waiting: list[Stream] = []  # ordered by queue key
        self.prefilling: Stream | None = None
        self.running: list[Stream] = []
        self.paused: list[Stream] = []

    # ---- for the scheduler

    @property
    def only_runs(self) -> bool:
        """Whether streams run, and none waits, is prefilled or is paused."""
        return bool(self.running) and not (self.waiting or self.prefilling or self.paused)

    def in_prefill_slot(self) -> Prefilling | None:
        """The stream in the prefill slot, as the scheduler needs it; None if the slot is free."""
        stream = self.prefilling
        if stream is None:
            return None
        left = len(stream.request.prompt) - self._cache.prefill_pushed
        return Prefilling(max(0, left), not stream.request.score, stream.priority)

    def head(self, size: int) -> tuple[Waiting, ...]:
        """The first `size` streams of the queue, as the scheduler needs them."""
        head = self.waiting[:size]
        return tuple(Waiting(s.to_prefill, not s.request.score, s.priority) for s in head)

    def returning(self) -> list[Stream]:
        """Paused streams whose readers have caught up, highest priority first."""
        back = [s for s in self.paused if s.subscriber.unread <= self._stream_buffer // 2]
        return sorted(back, key=lambda s: -s.priority)

    def preemptible(self, returning: Sequence[Stream]) -> list[Stream]:
        """Running streams of lower priority than one that waits for a slot, lowest first."""
        claiming = [*self.waiting[:1], self.prefilling, *returning[:1]]
        priorities = [s.priority for s in claiming if s is not None]
        highest = max(priorities, default=-inf)
        lower = [s for s in self.running if s.priority < highest]
        return sorted(lower, key=_QUEUE_KEY, reverse=True)

    # ---- from place to place

    def enqueue(self, stream: Stream) -> None:
        """Put a new stream into the queue."""
        stream.queue_key = (stream.queue_key[0], next(self._arrivals))
        insort(self.waiting, stream, key=_QUEUE_KEY)

    def begin(self) -> Stream:
        """Move the first stream of the queue, which needs no prefill, into the batch."""
        stream = self.waiting[0]
        self._place_row(stream)
        del self.waiting[0]
        return stream

    def start_prefill(self) -> Stream:
        """Move the first stream of the queue into the prefill slot."""
        stream = self.waiting[0]
        if stream.saved is not None:
            self._cache.resume_prefill(stream.request.prompt.inputs(), stream.saved)
            stream.saved = None
        else:
            # The logits of every prompt token are needed, so cached blocks cannot be used.
            request = stream.request
            self._cache.start_prefill(None if request.predicts_prompt else request.prompt.inputs())
        self.prefilling = self.waiting.pop(0)
        return stream

    def join(self) -> None:
        """Move the prefilled stream into the batch.

        Waiting streams with the same prompt get a copy of its state. Without one they prefill.
        """
        assert self.prefilling is not None
        stream = self.prefilling
        self._cache.join()
        self._add(stream)
        self.prefilling = None
        siblings = [s for s in self.waiting if s.shares_prompt(stream)]
        if siblings:
            saved = self.try_save(stream)
            for sibling in siblings:
                sibling.saved = saved

    def preempt(self, stream: Stream) -> None:
        """Park a running stream for one of higher priority, and put it back into the queue."""
        self._park_row(stream)
        insort(self.waiting, stream, key=_QUEUE_KEY)

    def pause(self, stream: Stream) -> None:
        """Park a stream whose reader lags. It returns when half of its buffer is read."""
        self._park_row(stream)
        self.paused.append(stream)
        stream.paused = True

    def restore(self, stream: Stream) -> None:
        """Move a paused stream back into the batch."""
        self._place_row(stream)
        stream.paused = False
        self.paused.remove(stream)

    def remove(self, stream: Stream) -> None:
        """Remove a stream from its place. Does nothing if it is in none.

        If its row cannot be filled by the last one, this raises and the state of its row is lost.
        """
        if stream in self.running:
            self._leave_row(stream)
        elif stream is self.prefilling:
            self.prefilling = None
        elif stream in self.paused:
            self.paused.remove(stream)
        elif stream in self.waiting:
            self.waiting.remove(stream)

    def clear(self) -> list[Stream]:
        """Remove and return the streams of batch and prefill slot. Their state is lost."""
        streams = [*self.running, *([self.prefilling] if self.prefilling else [])]
        self.running, self.prefilling, self._sampling = [], None, None
        self._cache.clear()
        return streams

    # ---- sampling and state

    @property
    def sampling(self) -> SamplingBatch:
        """Sampling parameters, penalty states and grammars of the batch."""
        if self._sampling is None:
            parameters = [stream.request.sampling for stream in self.running]
            penalties = [stream.penalties for stream in self.running]
            grammars = [stream.grammar for stream in self.running]
            self._sampling = SamplingBatch.of(parameters, penalties, grammars)
        return self._sampling

    def pushed(self, stream: Stream) -> int | None:
        """Number of tokens pushed into the state of a stream; None if it has no state."""
        if stream in self.running:
            return int(self._cache.pushed[self.running.index(stream)])
        if stream is self.prefilling:
            return self._cache.prefill_pushed
        return None if stream.saved is None else stream.saved.pushed

    def save(self, stream: Stream) -> SavedState | None:
        """A copy of a stream's state; None if it has no state. The stream stays in its place."""
        if stream in self.running:
            return self._cache.save(self.running.index(stream))
        return self._cache.save_prefill() if stream is self.prefilling else stream.saved

    def try_save(self, stream: Stream) -> SavedState | None:
        """As `save`; None, which is counted and logged, if the state cannot be copied."""
        try:
            return self.save(stream)
        except Exception:
            SNAPSHOT_FAILURES.inc()
            _log.exception("the state of a stream could not be copied")
            return None

    def _place_row(self, stream: Stream) -> None:
        if stream.saved is None:
            self._cache.begin()
        else:
            self._cache.restore(stream.saved)
            stream.saved = None
        self._add(stream)

    def _park_row(self, stream: Stream) -> None:
        saved = self._cache.save(self.running.index(stream))
        self._leave_row(stream)
        stream.saved = saved
        if stream.penalties is not None:
            stream.penalties.detach()

    def _leave_row(self, stream: Stream) -> None:
        row = self.running.index(stream)
        moved = self._cache.leave(row)
        last = self.running.pop()
        if moved is not None:
            self.running[row] = last
        self._sampling = None

    def _add(self, stream: Stream) -> None:
        self.running.append(stream)
        self._sampling = None
