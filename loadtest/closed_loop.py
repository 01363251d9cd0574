"""A closed loop: a fixed number of streams, each followed by the next when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from concertina.client import AsyncClient
from loadtest.run import Run, observe
from loadtest.targets.concertina_api import CANCELLED, Record, Tally, send
from loadtest.workload import Request

_PAUSE_S = 0.1


async def drive(
    clients: Sequence[AsyncClient],
    requests: Iterator[Request],
    *,
    streams: int,
    model: str,
    timeout_s: float,
    keep_s: float = 0.0,
    tally: Tally,
) -> Run:
    """Keeps `streams` streams running, spread over the clients, until `requests` run out.

    When the calling task is cancelled, every stream is, and the run so far is returned.
    """
    records: list[Record] = []

    async def work(client: AsyncClient) -> None:
        for request in requests:
            record = await send(
                client, request, model=model, timeout_s=timeout_s, keep_s=keep_s, tally=tally
            )
            records.append(record)
            if record.failure == CANCELLED:
                return
            if not record.whole:
                # A refused stream ends at once; to send another right away would flood the server.
                await asyncio.sleep(record.retry_after_s or _PAUSE_S)

    workers = [asyncio.create_task(work(clients[i % len(clients)])) for i in range(streams)]
    return await observe(workers, records)
