"""An open loop: requests come at random moments, whatever happens to earlier ones."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from itertools import cycle
from time import perf_counter

from concertina.client import AsyncClient
from loadtest.run import Run, observe
from loadtest.targets.concertina_api import Record, Tally, send
from loadtest.workload import Request


async def drive(
    clients: Sequence[AsyncClient],
    requests: Iterator[Request],
    *,
    rate: float,
    seed: int,
    model: str,
    timeout_s: float,
    keep_s: float = 0.0,
    tally: Tally,
) -> Run:
    """Starts `rate` requests per second, spread over the clients, until `requests` run out.

    The gaps between them are exponentially distributed: a Poisson process, as of many independent
    callers. When the calling task is cancelled, every stream is, and the run so far is returned.
    """
    records: list[Record] = []
    rng = random.Random(seed)

    async def work(client: AsyncClient, request: Request) -> None:
        records.append(
            await send(
                client, request, model=model, timeout_s=timeout_s, keep_s=keep_s, tally=tally
            )
        )

    async def arrive() -> None:
        sending: set[asyncio.Task[None]] = set()
        due_s = perf_counter()
        try:
            for client in cycle(clients):
                due_s += rng.expovariate(rate)
                await asyncio.sleep(due_s - perf_counter())
                request = next(requests, None)
                if request is None:
                    break
                task = asyncio.create_task(work(client, request))
                sending.add(task)
                task.add_done_callback(sending.discard)
            await asyncio.gather(*sending)
        finally:
            for task in sending:
                task.cancel()  # its record says so
            await asyncio.gather(*sending, return_exceptions=True)

    return await observe([asyncio.create_task(arrive())], records)
