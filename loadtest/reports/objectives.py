"""What callers were promised: limits of latency that a request meets, or not."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from loadtest.record import Record

_NAMES: Final = ("ttft", "itl", "tpot", "e2e")
_GAPS: Final = 0.99
_TIME: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|)")


@dataclass(frozen=True, slots=True)
class Objective:
    """One limit, in seconds.

    name: `ttft`, to the first token; `itl`, between two events, which 99 of 100 gaps of the stream
    must meet; `tpot`, per token after the first event; `e2e`, to the end of the stream.
    """

    name: str
    limit_s: float

    def __str__(self) -> str:
        return f"{self.name} ≤ {self.limit_s * 1e3:g} ms"


def parse_objectives(text: str) -> tuple[Objective, ...]:
    """`ttft=500ms,itl=0.05,e2e=10s`. Raises ValueError for anything else."""
    found: dict[str, Objective] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.strip().partition("=")
        time = _TIME.fullmatch(value)
        if name not in _NAMES or name in found or time is None or float(time[1]) == 0:
            raise ValueError(
                f"{part.strip()!r} is no limit; give each of {', '.join(_NAMES)} at most once, "
                "with seconds or milliseconds: ttft=500ms,itl=0.05,e2e=10s"
            )
        found[name] = Objective(name, float(time[1]) / (1e3 if time[2] == "ms" else 1))
    return tuple(found.values())


def meets(record: Record, objectives: Sequence[Objective]) -> bool:
    """Whether a stream is whole and within all limits."""
    return record.whole and all(_time_ns(record, o.name) <= o.limit_s * 1e9 for o in objectives)


def time_per_token_ns(record: Record) -> float | None:
    """From the first token event to the last, over the tokens after the first event."""
    later = sum(record.counts[1:])
    return (record.tokens_ns[-1] - record.tokens_ns[0]) / later if later else None


def _time_ns(record: Record, name: str) -> float:
    """What the objective of this name limits, for a whole stream; 0 where there is nothing."""
    match name:
        case "ttft":
            return record.tokens_ns[0] - record.due_ns if record.tokens_ns else math.inf
        case "itl":
            gaps = sorted(later - earlier for earlier, later in pairwise(record.tokens_ns))
            return gaps[math.ceil(_GAPS * len(gaps)) - 1] if gaps else 0
        case "tpot":
            return time_per_token_ns(record) or 0
        case _:
            return record.ended_ns - record.due_ns
