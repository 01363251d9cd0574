"""What a run observes, and how late and busy the load generator itself is meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter_ns, process_time_ns

from loadtest.record import CANCELLED, UNFINISHED, Record

_TICK_NS = 10_000_000


@dataclass(frozen=True, slots=True)
class Window:
    """What of a run counts: from `opens_ns` to `closes_ns` on the clock.

    Requests that are due earlier belong to the ramp, and have no latency. From `closes_ns` on
    nothing is due, and at `cut_ns` what still runs is cut; None for no such limit.
    """

    opens_ns: int
    closes_ns: int | None = None
    cut_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """What the load generator observes.

    records: one per stream, in the order of their ends.
    lags_ns: how late the event loop is, sampled every ten milliseconds.
    interrupted: whether the calling task was cancelled before the requests ran out.
    window: what of it counts.
    cpu: processor time of the generator over the time that it ran; 1 is a whole core.
    """

    records: tuple[Record, ...]
    lags_ns: tuple[int, ...]
    interrupted: bool
    window: Window
    cpu: float = 0.0


async def observe(
    workers: Sequence[asyncio.Task[None]], records: Sequence[Record], window: Window
) -> Run:
    """Waits for the workers, which add to `records`, or until the window cuts them.

    When the calling task is cancelled, every worker is, and the run so far is returned.
    """
    lags_ns: list[int] = []
    ticker = asyncio.create_task(_measure_lag(lags_ns))
    began_ns, used_ns = perf_counter_ns(), process_time_ns()
    interrupted = False
    left_s = None if window.cut_ns is None else max(0.0, (window.cut_ns - began_ns) / 1e9)
    try:
        await asyncio.wait(workers, timeout=left_s, return_when=asyncio.FIRST_EXCEPTION)
    except asyncio.CancelledError:
        interrupted = True
    for task in (*workers, ticker):
        task.cancel()
    await asyncio.wait((*workers, ticker))
    for worker in workers:
        if not worker.cancelled():
            worker.result()
    if not interrupted:  # whoever was cancelled then was cut by the window
        records = [replace(r, failure=UNFINISHED) if r.failure == CANCELLED else r for r in records]
    cpu = (process_time_ns() - used_ns) / max(1, perf_counter_ns() - began_ns)
    return Run(tuple(records), tuple(lags_ns), interrupted, window, cpu)


async def _measure_lag(lags_ns: list[int]) -> None:
    due_ns = perf_counter_ns() + _TICK_NS
    while True:
        await asyncio.sleep((due_ns - perf_counter_ns()) / 1e9)
        # Ticks keep to a timetable: a stall of a second is a hundred late ticks, not one.
        late_ns = range(perf_counter_ns() - due_ns, -1, -_TICK_NS)
        lags_ns.extend(late_ns)
        due_ns += len(late_ns) * _TICK_NS
