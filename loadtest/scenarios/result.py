"""What the clients of a chaos run see, and what of it is allowed."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from concertina.client import Accepted
from loadtest.servers import START_LIMIT_S


@dataclass(frozen=True)
class Kill:
    """When servers were killed, and the streams that were in the store just before.

    stored: empty where the store does not fail, since then each is.
    """

    at: float
    both: bool
    stored: frozenset[str]


@dataclass
class Result:
    """What the clients see, counted while it happens.

    begun_again: calls that were refused, or broke before the stream was accepted, by their codes.
    not_durable: streams whose clients were told so. lost: those of them that a kill ended.
    accepted_s: from a request until its stream was accepted.
    wrong: streams that differ from their twins, are lost though they must not be, or wait too long.
    next_token_s, after_both_s: from a kill to a resumed stream's next event, when one server is
        killed, and when both are.
    prefill_s: the time to the next token of a new request with all known tokens as its prompt.
    """

    kills: int = 0
    killed_at_once: int = 0
    streams: int = 0
    resumed: int = 0
    begun_again: Counter[str] = field(default_factory=Counter)
    not_durable: int = 0
    lost: int = 0
    wrong: list[str] = field(default_factory=list)
    killed: list[Kill] = field(default_factory=list)
    accepted_s: list[float] = field(default_factory=list)
    next_token_s: list[float] = field(default_factory=list)
    after_both_s: list[float] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)

    def may_lose(self, stream: Accepted, since: float) -> bool:
        """Whether a stream may be lost that was asked for at `since`."""
        kills = [kill for kill in self.killed if kill.at >= since]
        stored = any(stream.stream_id in kill.stored for kill in kills)
        return bool(kills) and not stream.durable and not stored

    def accepted(self, seconds: float, most: float) -> None:
        """Note when a stream was accepted. Without a kill, that is after `most` seconds at most."""
        self.accepted_s.append(seconds)
        killed = self.killed and self.killed[-1].at > time.monotonic() - seconds - START_LIMIT_S
        if seconds > most and not killed:
            self.wrong.append(f"a stream was accepted after {seconds:.0f} s")

    def went_on(self) -> None:
        """Note how long after a kill a stream that was resumed got its next event."""
        if self.killed:
            last = self.killed[-1]
            times = self.after_both_s if last.both else self.next_token_s
            times.append(time.monotonic() - last.at)

    def report(self) -> dict[str, Any]:
        """For JSON; times as median and 99th percentile."""
        counts = ("kills", "killed_at_once", "streams", "resumed", "begun_again", "not_durable")
        report = {name: getattr(self, name) for name in (*counts, "lost", "wrong")}
        for name in ("accepted_s", "next_token_s", "after_both_s", "prefill_s"):
            times = sorted(getattr(self, name))
            if times:
                p99 = times[min(len(times) - 1, int(0.99 * len(times)))]
                report[name] = {
                    "samples": len(times),
                    "p50": round(statistics.median(times), 3),
                    "p99": round(p99, 3),
                }
        return report
