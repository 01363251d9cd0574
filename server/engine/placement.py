"""Where the streams of an engine are: each waits, is on the bench, in the batch, or paused.

Their state moves with them: rows of the cache follow the batch, what is elsewhere is parked.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from itertools import count
from math import inf
from operator import attrgetter

from server.engine.kv_cache import Cache, Parked
from server.engine.sampling.sampler import SamplingBatch
from server.engine.scheduler import Bench, Waiting
from server.engine.stream import Stream

_PLACE = attrgetter("place")


class Places:
    """The queue, the bench, the batch, and the streams whose readers lag."""

    def __init__(self, cache: Cache, stream_buffer: int) -> None:
        self._cache = cache
        self._stream_buffer = stream_buffer
        self._arrivals = count()
        self._sampling: SamplingBatch | None = None  # of the batch as it is, None when it changed
        self.waiting: list[Stream] = []  # in the order of their places
        self.bench: Stream | None = None
        self.running: list[Stream] = []
        self.paused: list[Stream] = []

    # ---- as the scheduler sees them

    def on_bench(self) -> Bench | None:
        """Who is on the bench."""
        if self.bench is None:
            return None
        left = len(self.bench.unpushed(self._cache.bench_pushed))
        return Bench(left, not self.bench.request.score, self.bench.priority)

    def head(self, size: int) -> tuple[Waiting, ...]:
        """The first of the queue."""
        head = self.waiting[:size]
        return tuple(Waiting(s.to_prefill, not s.request.score, s.priority) for s in head)

    def returning(self) -> list[Stream]:
        """Paused streams whose readers have caught up, the highest priority first."""
        back = [s for s in self.paused if s.unread <= self._stream_buffer // 2]
        return sorted(back, key=lambda s: -s.priority)

    def yielding(self, returning: Sequence[Stream]) -> list[Stream]:
        """Running streams of a lower priority than one that waits for a slot, the lowest first."""
        claiming = [*self.waiting[:1], self.bench, *returning[:1]]
        priorities = [s.priority for s in claiming if s is not None]
        highest = max(priorities, default=-inf)
        lower = [s for s in self.running if s.priority < highest]
        return sorted(lower, key=_PLACE, reverse=True)

    # ---- from place to place

    def enqueue(self, stream: Stream) -> None:
        """A new stream waits."""
        stream.place = (stream.place[0], next(self._arrivals))
        insort(self.waiting, stream, key=_PLACE)

    def begin(self) -> Stream:
        """The first of the queue, with nothing left to prefill, joins the batch."""
        stream = self.waiting.pop(0)
        self._place_row(stream)
        return stream

    def seat(self) -> Stream:
        """The first of the queue goes to the bench."""
        self.bench = stream = self.waiting.pop(0)
        if stream.parked is not None:
            self._cache.resume(stream.request.prompt, stream.parked)
            stream.parked = None
        else:
            # Where the prompt itself is predicted, every token of it has to be pushed.
            self._cache.seat(None if stream.request.predicts_prompt else stream.unpushed(0))
        return stream

    def join(self) -> None:
        """The stream on the bench joins the batch, and leaves its state to those that share it."""
        assert self.bench is not None
        row, stream = self._cache.join(), self.bench
        siblings = [s for s in self.waiting if s.shares_prompt(stream)]
        if siblings:
            parked = self._cache.park(row)
            for sibling in siblings:
                sibling.parked = parked
        self._add(stream)
        self.bench = None

    def preempt(self, stream: Stream) -> None:
        """Park a stream that gives its slot to one of a higher priority; it waits in its place."""
        self._park_row(stream)
        insort(self.waiting, stream, key=_PLACE)

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
        elif stream is self.bench:
            self.bench = None
        elif stream in self.paused:
            self.paused.remove(stream)
        else:
            self.waiting.remove(stream)

    def clear(self) -> list[Stream]:
        """Take out all that the model is at work on, whose state is lost; returns them."""
        streams = [*self.running, *([self.bench] if self.bench else [])]
        self.running, self.bench, self._sampling = [], None, None
        self._cache.clear()
        return streams

    # ---- what they hold

    @property
    def sampling(self) -> SamplingBatch:
        """How the batch draws."""
        if self._sampling is None:
            parameters = [stream.request.sampling for stream in self.running]
            self._sampling = SamplingBatch.of(parameters, [s.memory for s in self.running])
        return self._sampling

    def pushed(self, stream: Stream) -> int | None:
        """Tokens that the state of a stream has seen, None if it has none."""
        if stream in self.running:
            return int(self._cache.pushed[self.running.index(stream)])
        if stream is self.bench:
            return self._cache.bench_pushed
        return None if stream.parked is None else stream.parked.pushed

    def park(self, stream: Stream) -> Parked | None:
        """A copy of the state of a stream, None if it has none; the stream stays where it is."""
        if stream in self.running:
            return self._cache.park(self.running.index(stream))
        return self._cache.park_bench() if stream is self.bench else stream.parked

    def _place_row(self, stream: Stream) -> None:
        if stream.parked is None:
            self._cache.begin()
        else:
            self._cache.restore(stream.parked)
            stream.parked = None
        self._add(stream)

    def _park_row(self, stream: Stream) -> None:
        stream.parked = self._cache.park(self.running.index(stream))
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
