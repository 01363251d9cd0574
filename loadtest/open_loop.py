"""An open loop: requests come when they are due, whatever happens to earlier ones."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from itertools import cycle
from time import perf_counter_ns

from loadtest.record import Record
from loadtest.run import Run, Window, observe
from loadtest.target import Send, Tally
from loadtest.workload import Request


async def drive(
    senders: Sequence[Send],
    arrivals: Iterator[tuple[float, Request]],
    *,
    began_ns: int,
    window: Window,
    tally: Tally,
) -> Run:
    """Sends each request, spread over the senders, so many seconds after `began_ns`.

    The clock of a request starts when it is due, also when this loop comes late. When the calling
    task is cancelled, every stream is, and the run so far is returned.
    """
    records: list[Record] = []

    async def work(send: Send, request: Request, due_ns: int) -> None:
        records.append(await send(request, due_ns, tally))

    async def arrive() -> None:
        sending: set[asyncio.Task[None]] = set()
        try:
            for send, (due_s, request) in zip(cycle(senders), arrivals, strict=False):
                due_ns = began_ns + round(due_s * 1e9)
                await asyncio.sleep((due_ns - perf_counter_ns()) / 1e9)
                task = asyncio.create_task(work(send, request, due_ns))
                sending.add(task)
                task.add_done_callback(sending.discard)
            await asyncio.gather(*sending)
        finally:
            for task in sending:
                task.cancel()  # its record says so
            await asyncio.gather(*sending, return_exceptions=True)

    return await observe([asyncio.create_task(arrive())], records, window)
