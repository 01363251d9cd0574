"""A closed loop: a fixed number of streams, each followed by the next when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import islice, takewhile
from time import perf_counter, perf_counter_ns

from concertina.channel import Access
from concertina.client import AsyncClient, InvalidRequest, Model
from loadtest.client import CANCELLED, Record, Tally, send
from loadtest.progress import show_progress
from loadtest.workload import Lengths, Request, draw_requests

_MODEL_TIMEOUT_S = 10.0
_TICK_NS = 10_000_000
_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run. It stands beside the numbers in the JSON, so that a run can be repeated.

    Nothing starts after `requests` requests or `duration_s` seconds, None for no such limit.
    `prompts` replace random ones of `prompt_tokens` tokens.
    """

    address: str
    model: str
    streams: int
    channels: int
    requests: int | None
    duration_s: float | None
    prompt_tokens: Lengths
    output_tokens: Lengths
    prompts: tuple[str, ...]
    warmup: int
    seed: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """What a closed loop observed.

    records: one per stream, in the order of their ends.
    lags_ns: how late the event loop was, sampled every ten milliseconds.
    interrupted: whether the calling task was cancelled before the requests were used up.
    """

    records: tuple[Record, ...]
    lags_ns: tuple[int, ...]
    interrupted: bool


async def measure(plan: Plan, access: Access) -> tuple[Model, Run]:
    """Warms the server up, runs the plan, and says which model it ran on.

    access: kept out of the plan, since that is written to reports.

    Raises InvalidRequest if the model's context is too short for the plan, and what
    `AsyncClient.model` raises.
    """
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                AsyncClient(plan.address, key=access.key, tls=access.tls)
            )
            for _ in range(plan.channels)
        ]
        served = await clients[0].model(plan.model, timeout=_MODEL_TIMEOUT_S)
        longest = plan.prompt_tokens.high + plan.output_tokens.high
        if not plan.prompts and longest > served.context:
            raise InvalidRequest(
                f"{served.name} has a context of {served.context} tokens; prompt and output take "
                f"up to {longest}. Lower --prompt-tokens or --output-tokens."
            )
        drawn = draw_requests(
            plan.seed,
            vocabulary=served.vocabulary,
            prompt_lengths=plan.prompt_tokens,
            output_lengths=plan.output_tokens,
            prompts=plan.prompts,
        )
        warmed = await _phase("warm-up", plan, clients, drawn, plan.warmup, None)
        if warmed.interrupted:
            return served, Run((), (), interrupted=True)
        return served, await _phase("run", plan, clients, drawn, plan.requests, plan.duration_s)


async def _phase(
    name: str,
    plan: Plan,
    clients: Sequence[AsyncClient],
    drawn: Iterator[Request],
    requests: int | None,
    duration_s: float | None,
) -> Run:
    """One closed loop over the next requests, with a progress bar."""
    limited: Iterator[Request] = islice(drawn, requests)
    if duration_s is not None:
        end = perf_counter() + duration_s
        limited = takewhile(lambda _: perf_counter() < end, limited)
    tally = Tally()
    bar = asyncio.create_task(show_progress(name, tally, requests=requests, duration_s=duration_s))
    try:
        return await drive(
            clients,
            limited,
            streams=plan.streams,
            model=plan.model,
            timeout_s=plan.timeout_s,
            tally=tally,
        )
    finally:
        bar.cancel()
        await asyncio.wait([bar])


async def drive(
    clients: Sequence[AsyncClient],
    requests: Iterator[Request],
    *,
    streams: int,
    model: str,
    timeout_s: float,
    tally: Tally,
) -> Run:
    """Keeps `streams` streams running, spread over the clients, until `requests` are used up.

    When the calling task is cancelled, every stream is, and the run so far is returned.
    """
    records: list[Record] = []
    lags_ns: list[int] = []

    async def work(client: AsyncClient) -> None:
        for request in requests:
            record = await send(client, request, model=model, timeout_s=timeout_s, tally=tally)
            records.append(record)
            if record.failure == CANCELLED:
                return
            if not record.whole:
                # A refused stream ends at once; another one right after it would be a flood.
                await asyncio.sleep(record.retry_after_s or _PAUSE_S)

    workers = [asyncio.create_task(work(clients[i % len(clients)])) for i in range(streams)]
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
