"""What a run observes, and how late the load generator itself is meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter_ns

from loadtest.targets.concertina_api import Record

_TICK_NS = 10_000_000


@dataclass(frozen=True, slots=True)
class Run:
    """What the load generator observes.

    records: one per stream, in the order of their ends.
    lags_ns: how late the event loop is, sampled every ten milliseconds.
    interrupted: whether the calling task was cancelled before the requests ran out.
    """

    records: tuple[Record, ...]
    lags_ns: tuple[int, ...]
    interrupted: bool


async def observe(workers: Sequence[asyncio.Task[None]], records: Sequence[Record]) -> Run:
    """Waits for the workers, which add to `records`.

    When the calling task is cancelled, every worker is, and the run so far is returned.
    """
    lags_ns: list[int] = []
    ticker = asyncio.create_task(_measure_lag(lags_ns))
    interrupted = False
    try:
        await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
    except asyncio.CancelledError:
        interrupted = True
    for task in (*workers, ticker):
        task.cancel()
    await asyncio.wait((*workers, ticker))
    for worker in workers:
        if not worker.cancelled():
            worker.result()
    return Run(tuple(records), tuple(lags_ns), interrupted)


async def _measure_lag(lags_ns: list[int]) -> None:
    due_ns = perf_counter_ns() + _TICK_NS
    while True:
        await asyncio.sleep((due_ns - perf_counter_ns()) / 1e9)
        # Ticks keep to a timetable: a stall of a second is a hundred late ticks, not one.
        late_ns = range(perf_counter_ns() - due_ns, -1, -_TICK_NS)
        lags_ns.extend(late_ns)
        due_ns += len(late_ns) * _TICK_NS
