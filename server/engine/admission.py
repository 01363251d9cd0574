"""Decides whether an engine can admit more streams, from the weight of those it holds.

A stream is weighed before any work on it. Its request gives the largest number of tokens, and the
manifest gives the bytes of state that this many tokens take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.engine.stream import Stream
from server.errors import InvalidRequest, Overloaded, RequestError
from server.request import Request

_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.1, 30.0
_UNKNOWN_INTERVAL_S = 1.0
_REMEMBERED_ENDS = 64
_LIMITS = {  # field of `Weight`: reason, unit, remedy
    "streams": (
        "queue_full",
        "streams, running or waiting,",
        "ask for fewer outputs, or serve with a larger --queue-limit",
    ),
    "queue_tokens": (
        "queue_tokens",
        "prompt tokens in the queue",
        "send a shorter prompt, or serve with a larger --queue-tokens",
    ),
    "state_bytes": (
        "state_bytes",
        "bytes of state",
        "lower max_tokens, or serve with a larger --state-limit-bytes",
    ),
}


@dataclass(frozen=True)
class Weight:
    """How much of an engine's limits some streams take."""

    streams: int = 0
    """Streams that have not ended."""
    queue_tokens: int = 0
    """Tokens of prompts whose prefill has not begun."""
    state_bytes: int = 0
    """Largest state in bytes that the streams can reach, and the lists of their requests."""

    def __add__(self, other: Weight) -> Weight:
        return Weight(
            self.streams + other.streams,
            self.queue_tokens + other.queue_tokens,
            self.state_bytes + other.state_bytes,
        )

    def __sub__(self, other: Weight) -> Weight:
        return Weight(
            self.streams - other.streams,
            self.queue_tokens - other.queue_tokens,
            self.state_bytes - other.state_bytes,
        )


@dataclass(frozen=True)
class Refusal:
    """Why a request is not admitted: a label for metrics, and a message for the caller.

    retry_after_s: seconds until there may be room; None if the request can never be admitted.
    """

    reason: str
    message: str
    retry_after_s: float | None

    @property
    def error(self) -> RequestError:
        """The error to raise: Overloaded, or InvalidRequest if a retry cannot help."""
        if self.retry_after_s is None:
            return InvalidRequest(self.message)
        return Overloaded(self.message, self.retry_after_s)


@dataclass(frozen=True)
class Pace:
    """When the latest streams ended, oldest first, in seconds. The first may be when work began."""

    times_s: tuple[float, ...] = ()

    def after(self, now: float) -> Pace:
        """The pace after one more stream has ended at `now`."""
        return Pace((*self.times_s[-_REMEMBERED_ENDS:], now))

    def retry_after_s(self, ends: float, now: float) -> float:
        """Estimated seconds until `ends` more streams have ended, between 0.1 and 30."""
        count = len(self.times_s) - 1
        interval_s = (now - self.times_s[0]) / count if count > 0 else _UNKNOWN_INTERVAL_S
        return min(max(ends * interval_s, _SHORTEST_WAIT_S), _LONGEST_WAIT_S)


def weigh(bundle: Bundle, requests: Sequence[Request]) -> tuple[Weight, ...]:
    """The weight of each output of one request. Prompt and lists, which they share, count once."""
    first = requests[0]
    return tuple(
        Weight(
            streams=1,
            queue_tokens=0 if r is not first and r.prompt is first.prompt else len(r.prompt),
            state_bytes=bundle.peak_state_bytes(r.last_position)
            + (r.lists_bytes if r is first else 0),
        )
        for r in requests
    )


def limits(config: EngineConfig, memory_bytes: int) -> Weight:
    """The largest weight that an engine admits, on a machine with `memory_bytes` of memory."""
    state_bytes = config.state_limit_bytes or memory_bytes // 2
    return Weight(config.slots + config.queue_limit, config.queue_tokens, state_bytes)


def check(held: Weight, wanted: Weight, limits: Weight, pace: Pace, now: float) -> Refusal | None:
    """None if `wanted` fits beside `held`; else the refusal by the first limit that it exceeds."""
    for field, (reason, unit, remedy) in _LIMITS.items():
        taken, adds, limit = (getattr(weight, field) for weight in (held, wanted, limits))
        if not adds or taken + adds <= limit:
            continue
        if adds > limit:
            message = f"the request adds {adds} {unit}, at most {limit} are admitted: {remedy}"
            return Refusal(reason, message, None)
        message = (
            f"{taken} of at most {limit} {unit} are taken and the request adds {adds}: "
            f"try again later, {remedy}"
        )
        ends = (taken + adds - limit) * held.streams / taken
        return Refusal(reason, message, pace.retry_after_s(ends, now))
    return None


class Ledger:
    """The weight of all streams that an engine has admitted.

    Not thread-safe: the engine holds its lock during each change.
    """

    def __init__(self, bundle: Bundle, limits: Weight) -> None:
        self.held = Weight()
        self._bundle = bundle
        self._limits = limits
        self._weights: dict[Stream, Weight] = {}
        self._pace = Pace()

    def admit(self, streams: Sequence[Stream], now: float) -> Refusal | None:
        """Admit the outputs of one request, all or none. Returns a refusal if there is no room."""
        weights = weigh(self._bundle, [stream.request for stream in streams])
        wanted = reduce(add, weights)
        refusal = self._refusal(wanted, now)
        if refusal is None:
            if not self.held.streams:
                self._pace = Pace((now,))
            self.held += wanted
            self._weights.update(zip(streams, weights, strict=True))
        return refusal

    def full(self, now: float) -> Refusal | None:
        """The refusal of any further stream, whatever its request; None if there is room."""
        return self._refusal(Weight(streams=1), now)

    def ends_after_s(self, ends: float, now: float) -> float:
        """Estimated seconds until `ends` more streams have ended, between 0.1 and 30."""
        return self._pace.retry_after_s(ends, now)

    @property
    def is_empty(self) -> bool:
        """Whether no stream is admitted."""
        return not self._weights and self.held == Weight()

    def began(self, stream: Stream) -> None:
        """Record that work on the stream begins: its prompt no longer counts as queued."""
        weight = self._weights[stream]
        self.held -= Weight(queue_tokens=weight.queue_tokens)
        self._weights[stream] = replace(weight, queue_tokens=0)

    def release(self, stream: Stream) -> None:
        """Remove a stream that was never taken in."""
        self.held -= self._weights.pop(stream)

    def ended(self, stream: Stream, now: float) -> None:
        """Record that the stream ended at `now`: its weight is free."""
        self.held -= self._weights.pop(stream)
        self._pace = self._pace.after(now)

    def _refusal(self, wanted: Weight, now: float) -> Refusal | None:
        refusal = check(self.held, wanted, self._limits, self._pace, now)
        return refusal and replace(refusal, message=f"{self._bundle.name}: {refusal.message}")
