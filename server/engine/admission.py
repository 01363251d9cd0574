"""Whether an engine can take on more: arithmetic on what it holds, and nothing else.

A stream is weighed before anything is done for it. What it may come to is known then: how many
tokens it ends with at most, and from the manifest the bytes of state that this takes.
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
    """What streams take of an engine."""

    streams: int = 0
    """Streams that have not ended."""
    queue_tokens: int = 0
    """Tokens of prompts on which work has not begun."""
    state_bytes: int = 0
    """State that the streams may come to hold."""

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
    """Why a request is not taken on, as a word and in words.

    retry_after_s: when there may be room; None when there never will be.
    """

    reason: str
    message: str
    retry_after_s: float | None

    @property
    def error(self) -> RequestError:
        """What the caller gets."""
        if self.retry_after_s is None:
            return InvalidRequest(self.message)
        return Overloaded(self.message, self.retry_after_s)


@dataclass(frozen=True)
class Pace:
    """When streams ended lately, oldest first, in seconds; the first may be when work began."""

    times_s: tuple[float, ...] = ()

    def after(self, now: float) -> Pace:
        """The pace once one more stream has ended."""
        return Pace((*self.times_s[-_REMEMBERED_ENDS:], now))

    def retry_after_s(self, ends: float, now: float) -> float:
        """About how long it takes until so many more streams have ended, within bounds."""
        known = len(self.times_s) - 1
        interval_s = (now - self.times_s[0]) / known if known > 0 else _UNKNOWN_INTERVAL_S
        return min(max(ends * interval_s, _SHORTEST_WAIT_S), _LONGEST_WAIT_S)


def weigh(bundle: Bundle, requests: Sequence[Request]) -> tuple[Weight, ...]:
    """What each of the streams submitted together takes; a prompt they share is queued once."""
    first = requests[0]
    return tuple(
        Weight(
            streams=1,
            queue_tokens=0 if r is not first and r.prompt is first.prompt else len(r.prompt),
            state_bytes=bundle.peak_state_bytes(r.last_position),
        )
        for r in requests
    )


def limits(config: EngineConfig, memory_bytes: int) -> Weight:
    """The most that an engine takes on, on a machine with so much memory."""
    state_bytes = config.state_limit_bytes or memory_bytes // 2
    return Weight(config.slots + config.queue_limit, config.queue_tokens, state_bytes)


def check(held: Weight, wanted: Weight, limits: Weight, pace: Pace, now: float) -> Refusal | None:
    """None if there is room for `wanted` beside what is `held`; else the first limit exceeded."""
    for field, (reason, unit, remedy) in _LIMITS.items():
        has, adds, limit = (getattr(weight, field) for weight in (held, wanted, limits))
        if not adds or has + adds <= limit:
            continue
        if adds > limit:
            said = f"the request adds {adds} {unit}, at most {limit} are taken on: {remedy}"
            return Refusal(reason, said, None)
        said = (
            f"{has} of at most {limit} {unit} are taken and the request adds {adds}: "
            f"try again later, {remedy}"
        )
        ends = (has + adds - limit) * held.streams / has
        return Refusal(reason, said, pace.retry_after_s(ends, now))
    return None


class Ledger:
    """What an engine has taken on. Two threads change it: the engine holds its lock meanwhile."""

    def __init__(self, bundle: Bundle, limits: Weight) -> None:
        self.held = Weight()
        self._bundle = bundle
        self._limits = limits
        self._weights: dict[Stream, Weight] = {}
        self._pace = Pace()

    def admit(self, streams: Sequence[Stream], now: float) -> Refusal | None:
        """Take on streams that were submitted together, all of them unless one is refused."""
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
        """Why not one stream more is taken on, whatever it may ask for."""
        return self._refusal(Weight(streams=1), now)

    @property
    def is_empty(self) -> bool:
        """Whether it holds nothing."""
        return not self._weights and self.held == Weight()

    def began(self, stream: Stream) -> None:
        """Work on the stream begins: its prompt is in the queue no longer."""
        weight = self._weights[stream]
        self.held -= Weight(queue_tokens=weight.queue_tokens)
        self._weights[stream] = replace(weight, queue_tokens=0)

    def ended(self, stream: Stream, now: float) -> None:
        """The stream holds nothing any more."""
        self.held -= self._weights.pop(stream)
        self._pace = self._pace.after(now)

    def _refusal(self, wanted: Weight, now: float) -> Refusal | None:
        refusal = check(self.held, wanted, self._limits, self._pace, now)
        return refusal and replace(refusal, message=f"{self._bundle.name}: {refusal.message}")
