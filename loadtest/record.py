"""What one request became."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

CANCELLED: Final = "Cancelled"
REFUSED: Final = "Overloaded RESOURCE_EXHAUSTED"
UNFINISHED: Final = "Unfinished"


@dataclass(frozen=True, slots=True)
class Record:
    """One stream as observed. Times are readings of one monotonic clock.

    stream_id: empty if the stream was never accepted.
    due_ns: when the request should have been made; every latency begins here, so that a load
        generator that comes late cannot hide it.
    started_ns: before the call is made, so that connecting and queueing count.
    accepted_ns: None if the stream was never accepted.
    tokens_ns: when each token event arrived.
    counts: how many tokens each of them brought.
    ended_ns: when the last event or the failure arrived.
    prompt_tokens: as the server counts them.
    failure: kind of the failure, empty for none.
    retry_after_s: how long the server asks to wait after a failure, None without such a request.
    violation: how the server breaks the contract of the stream, empty if it keeps it.
    resumed: how often the stream was lost and then resumed.
    queue_s: how long it waited for a slot, as the server says; None if it does not.
    state_bytes: the state that it held at its end, as the server says; None if it does not.
    """

    stream_id: str
    due_ns: int
    started_ns: int
    accepted_ns: int | None
    tokens_ns: tuple[int, ...]
    counts: tuple[int, ...]
    ended_ns: int
    prompt_tokens: int
    failure: str
    retry_after_s: float | None
    violation: str
    resumed: int = 0
    queue_s: float | None = None
    state_bytes: int | None = None

    @property
    def whole(self) -> bool:
        """Whether the stream brought all that was asked for, by the contract."""
        return not self.failure and not self.violation
