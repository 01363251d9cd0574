"""Carries out a plan: warm-up, then a closed or an open loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import islice, takewhile
from time import perf_counter

from concertina.client import AsyncClient, InvalidRequest, Model
from concertina.client.channel import Access
from loadtest import closed_loop, open_loop
from loadtest.progress import show_progress
from loadtest.run import Run
from loadtest.targets.concertina_api import Tally
from loadtest.workload import Lengths, Request, draw_requests

_MODEL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run. The JSON report holds it beside the numbers, so that a run can be repeated.

    A closed loop of `streams`, or an open one of `rate` requests per second if that is not None.
    Nothing starts after `requests` requests or `duration_s` seconds, None for no such limit.
    `prompts` replace random ones of `prompt_tokens` tokens. The server keeps lost streams for
    `keep_s` seconds, in which they can go on.
    """

    address: str
    model: str
    streams: int
    rate: float | None
    channels: int
    requests: int | None
    duration_s: float | None
    prompt_tokens: Lengths
    output_tokens: Lengths
    prompts: tuple[str, ...]
    warmup: int
    seed: int
    timeout_s: float
    keep_s: float = 0.0


async def measure(plan: Plan, access: Access) -> tuple[Model, Run]:
    """Warms the server up and runs the plan; which model it ran on, and the run.

    access: not in the plan, since reports hold the plan.

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
            begin=served.begin_token,
            has_begin=served.counts_first_token,
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
    """One loop over the next requests, with a progress bar; to warm up, always a closed one."""
    limited: Iterator[Request] = islice(drawn, requests)
    if duration_s is not None:
        end = perf_counter() + duration_s
        limited = takewhile(lambda _: perf_counter() < end, limited)
    tally = Tally()
    bar = asyncio.create_task(show_progress(name, tally, requests=requests, duration_s=duration_s))
    try:
        if plan.rate is None or name == "warm-up":
            return await closed_loop.drive(
                clients,
                limited,
                streams=plan.streams,
                model=plan.model,
                timeout_s=plan.timeout_s,
                keep_s=plan.keep_s,
                tally=tally,
            )
        return await open_loop.drive(
            clients,
            limited,
            rate=plan.rate,
            seed=plan.seed,
            model=plan.model,
            timeout_s=plan.timeout_s,
            keep_s=plan.keep_s,
            tally=tally,
        )
    finally:
        bar.cancel()
        await asyncio.wait([bar])
