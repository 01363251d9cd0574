"""Where the streams of an engine are: each waits, is prefilled, runs in the batch, or is paused.

Their state moves with them: rows of the cache follow the batch, what is elsewhere is saved.
"""

from __future__ import annotations

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

_QUEUE_KEY = attrgetter("queue_key")


class Placement:
    """The queue, the prefill slot, the batch, and the streams whose readers lag."""

    def __init__(self, cache: Cache, stream_buffer: int) -> None:
        self._cache = cache
        self._stream_buffer = stream_buffer
        self._arrivals = count()
        self._sampling: SamplingBatch | None = None  # of the batch as it is, None when it changed
        self.waiting: list[Stream] = []  # in the order of their keys
        self.prefilling: Stream | None = None
        self.running: list[Stream] = []
        self.paused: list[Stream] = []

    # ---- as the scheduler sees them

    def in_prefill_slot(self) -> Prefilling | None:
        """What the scheduler knows of the stream in the prefill slot."""
        stream = self.prefilling
        if stream is None:
            return None
        left = len(stream.request.prompt) - self._cache.prefill_pushed
        return Prefilling(max(0, left), not stream.request.score, stream.priority)

    def head(self, size: int) -> tuple[Waiting, ...]:
        """The first of the queue."""
        head = self.waiting[:size]
        return tuple(Waiting(s.to_prefill, not s.request.score, s.priority) for s in head)

    def returning(self) -> list[Stream]:
        """Paused streams whose readers have caught up, the highest priority first."""
        back = [s for s in self.paused if s.subscriber.unread <= self._stream_buffer // 2]
        return sorted(back, key=lambda s: -s.priority)

    def yielding(self, returning: Sequence[Stream]) -> list[Stream]:
        """Running streams of a lower priority than one that waits for a slot, the lowest first."""
        claiming = [*self.waiting[:1], self.prefilling, *returning[:1]]
        priorities = [s.priority for s in claiming if s is not None]
        highest = max(priorities, default=-inf)
        lower = [s for s in self.running if s.priority < highest]
        return sorted(lower, key=_QUEUE_KEY, reverse=True)

    # ---- from place to place

    def enqueue(self, stream: Stream) -> None:
        """A new stream waits."""
        stream.queue_key = (stream.queue_key[0], next(self._arrivals))
        insort(self.waiting, stream, key=_QUEUE_KEY)

    def begin(self) -> Stream:
        """The first of the queue, with nothing left to prefill, joins the batch."""
        stream = self.waiting.pop(0)
        self._place_row(stream)
        return stream

    def start_prefill(self) -> Stream:
        """The first of the queue gets the prefill slot."""
        self.prefilling = stream = self.waiting.pop(0)
        if stream.saved is not None:
            self._cache.resume_prefill(stream.request.prompt.inputs(), stream.saved)
            stream.saved = None
        else:
            # Where the prompt itself is predicted, every token of it has to be pushed.
            request = stream.request
            self._cache.start_prefill(None if request.predicts_prompt else request.prompt.inputs())
        return stream

    def join(self) -> None:
        """The prefilled stream joins the batch, and leaves its state to those that share it."""
        assert self.prefilling is not None
        row, stream = self._cache.join(), self.prefilling
        siblings = [s for s in self.waiting if s.shares_prompt(stream)]
        if siblings:
            saved = self._cache.save(row)
            for sibling in siblings:
                sibling.saved = saved
        self._add(stream)
        self.prefilling = None

    def preempt(self, stream: Stream) -> None:
        """Park a stream that gives its slot to one of a higher priority; it waits in its turn."""
        self._park_row(stream)
        insort(self.waiting, stream, key=_QUEUE_KEY)

    def pause(self, stream: Stream) -> None:
        """Park a stream whose reader lags; it comes back when half of its buffer is read."""
        self._park_row(stream)
        self.paused.append(stream)
        stream.paused = True

    def restore(self, stream: Stream) -> None:
        """A paused stream joins the batch again."""
        self._place_row(stream)
        stream.paused = False
        self.paused.remove(stream)

    def remove(self, stream: Stream) -> None:
        """Take a stream out of wherever it is."""
        if stream in self.running:
            self._leave_row(stream)
        elif stream is self.prefilling:
            self.prefilling = None
        elif stream in self.paused:
            self.paused.remove(stream)
        else:
            self.waiting.remove(stream)

    def clear(self) -> list[Stream]:
        """Take out all that the model is at work on, whose state is lost; returns them."""
        streams = [*self.running, *([self.prefilling] if self.prefilling else [])]
        self.running, self.prefilling, self._sampling = [], None, None
        self._cache.clear()
        return streams

    # ---- what they hold

    @property
    def sampling(self) -> SamplingBatch:
        """How the batch draws."""
        if self._sampling is None:
            parameters = [stream.request.sampling for stream in self.running]
            self._sampling = SamplingBatch.of(parameters, [s.penalties for s in self.running])
        return self._sampling

    def pushed(self, stream: Stream) -> int | None:
        """Tokens that the state of a stream has seen, None if it has none."""
        if stream in self.running:
            return int(self._cache.pushed[self.running.index(stream)])
        if stream is self.prefilling:
            return self._cache.prefill_pushed
        return None if stream.saved is None else stream.saved.pushed

    def save(self, stream: Stream) -> SavedState | None:
        """A copy of the state of a stream, None if it has none; the stream stays where it is."""
        if stream in self.running:
            return self._cache.save(self.running.index(stream))
        return self._cache.save_prefill() if stream is self.prefilling else stream.saved

    def _place_row(self, stream: Stream) -> None:
        if stream.saved is None:
            self._cache.begin()
        else:
            self._cache.restore(stream.saved)
            stream.saved = None
        self._add(stream)

    def _park_row(self, stream: Stream) -> None:
        stream.saved = self._cache.save(self.running.index(stream))
        self._leave_row(stream)

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
