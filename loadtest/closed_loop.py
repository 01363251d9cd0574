"""A closed loop: a fixed number of streams, each followed by the next when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from time import perf_counter_ns

from loadtest.record import CANCELLED, Record
from loadtest.run import Run, Window, observe
from loadtest.target import Send, Tally
from loadtest.workload import Request

_PAUSE_S = 0.1


async def drive(
    senders: Sequence[Send],
    requests: Iterator[Request],
    *,
    streams: int,
    window: Window,
    tally: Tally,
    ramp_s: float = 0.0,
) -> Run:
    """Keeps `streams` streams running, spread over the senders, until `requests` run out.

    The first ones start one after the other within `ramp_s` seconds. A request is due when the
    stream before it ends. When the calling task is cancelled, every stream is, and the run so far
    is returned.
    """
    records: list[Record] = []

    async def work(send: Send, wait_s: float) -> None:
        if wait_s:
            await asyncio.sleep(wait_s)
        due_ns = perf_counter_ns()
        for request in requests:
            record = await send(request, due_ns, tally)
            records.append(record)
            due_ns = record.ended_ns
            if record.failure == CANCELLED:
                return
            if not record.whole:
                # A refused stream ends at once; to send another right away would flood the server.
                await asyncio.sleep(record.retry_after_s or _PAUSE_S)
                due_ns = perf_counter_ns()

    workers = [
        asyncio.create_task(work(senders[i % len(senders)], ramp_s * i / streams))
        for i in range(streams)
    ]
    return await observe(workers, records, window)
