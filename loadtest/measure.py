"""Carries out a plan: warm-up, then a closed or an open loop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from itertools import islice
from time import perf_counter_ns
from typing import Literal, TypeAlias

from concertina.client import InvalidRequest
from concertina.client.channel import Access
from loadtest import closed_loop, open_loop
from loadtest.arrivals import POISSON, Arrivals, due_times
from loadtest.progress import show_progress
from loadtest.run import Run, Window
from loadtest.target import Served, Tally, Target
from loadtest.targets.concertina_api import concertina_target
from loadtest.targets.openai_api import openai_target
from loadtest.trace import Entry, trace_requests
from loadtest.workload import Lengths, Request, draw_requests

Api: TypeAlias = Literal["concertina", "openai"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run. The JSON report holds it beside the numbers, so that a run can be repeated.

    A closed loop of `streams`, or an open one: of `rate` requests per second, if that is not None,
    or of the requests of a `trace`, if it has any.
    The load grows for `ramp_s` seconds, which do not count. Then nothing is due after `requests`
    requests or `duration_s` seconds, None for no such limit; streams that still run `grace_s`
    seconds after the duration are cut, None for never.
    `prompts` replace random ones of `prompt_tokens` tokens. The server keeps lost streams for
    `keep_s` seconds, in which they can go on. `trace_scale` multiplied the lengths of the trace.
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
    api: Api = "concertina"
    arrivals: Arrivals = POISSON
    ramp_s: float = 0.0
    grace_s: float | None = None
    trace: tuple[Entry, ...] = ()
    trace_scale: float = 1.0

    @property
    def is_open(self) -> bool:
        """Whether requests come by the clock, and not when others end."""
        return self.rate is not None or bool(self.trace)


async def measure(plan: Plan, access: Access) -> tuple[Served, Run]:
    """Warms the server up and runs the plan; which model it ran on, and the run.

    access: not in the plan, since reports hold the plan.

    Raises InvalidRequest if the model's context is too short for the plan, and what
    `AsyncClient.model` raises.
    """
    async with opened(plan, access) as target:
        return target.served, await run_plan(plan, target)


def opened(plan: Plan, access: Access) -> AbstractAsyncContextManager[Target]:
    """The server of a plan."""
    if plan.api == "openai":
        return openai_target(plan.address, plan.model, access, timeout_s=plan.timeout_s)
    return concertina_target(
        plan.address,
        plan.model,
        access,
        channels=plan.channels,
        timeout_s=plan.timeout_s,
        keep_s=plan.keep_s,
    )


async def run_plan(plan: Plan, target: Target, name: str = "run") -> Run:
    """Warms the server up and runs the plan. Raises InvalidRequest as `measure` does."""
    served = target.served
    require_fit(plan, served)
    prompt_lengths, output_lengths = plan.prompt_tokens, plan.output_tokens
    if plan.trace:  # what warms the server up is of the same kind
        prompt_lengths = _range(entry.prompt_tokens for entry in plan.trace)
        output_lengths = _range(entry.output_tokens for entry in plan.trace)
    drawn = draw_requests(
        plan.seed,
        vocabulary=served.vocabulary,
        prompt_lengths=prompt_lengths,
        output_lengths=output_lengths,
        prompts=plan.prompts,
        begin=served.begin_token,
        has_begin=served.has_begin,
    )
    tally = Tally()
    warming = closed_loop.drive(
        target.senders,
        islice(drawn, plan.warmup),
        streams=plan.streams,
        window=Window(perf_counter_ns()),
        tally=tally,
    )
    warmed = await _shown("warm-up", warming, tally, requests=plan.warmup, duration_s=None)
    if warmed.interrupted:
        return replace(warmed, records=(), lags_ns=())
    return await _load(plan, target, drawn, name)


def _range(lengths: Iterable[int]) -> Lengths:
    known = sorted(lengths)
    return Lengths(known[0], known[-1])


async def _load(plan: Plan, target: Target, drawn: Iterator[Request], name: str) -> Run:
    began_ns = perf_counter_ns()
    opens_ns = began_ns + round(plan.ramp_s * 1e9)
    closes_ns = cut_ns = None
    duration_s = plan.duration_s
    if duration_s is not None:
        closes_ns = opens_ns + round(duration_s * 1e9)
        cut_ns = None if plan.grace_s is None else closes_ns + round(plan.grace_s * 1e9)
    window, tally = Window(opens_ns, closes_ns, cut_ns), Tally()
    if plan.is_open:
        running = open_loop.drive(
            target.senders,
            _limited(_arrivals(plan, target.served, drawn), plan),
            began_ns=began_ns,
            window=window,
            tally=tally,
        )
    else:

        def elapsed() -> Iterator[tuple[float, Request]]:
            for request in drawn:
                yield (perf_counter_ns() - began_ns) / 1e9, request

        running = closed_loop.drive(
            target.senders,
            (request for _, request in _limited(elapsed(), plan)),
            streams=plan.streams,
            window=window,
            tally=tally,
            ramp_s=plan.ramp_s,
        )
    whole_s = None if duration_s is None else plan.ramp_s + duration_s
    return await _shown(name, running, tally, requests=plan.requests, duration_s=whole_s)


def _arrivals(
    plan: Plan, served: Served, drawn: Iterator[Request]
) -> Iterator[tuple[float, Request]]:
    if plan.trace:
        return trace_requests(
            plan.trace,
            plan.seed,
            vocabulary=served.vocabulary,
            scale=plan.trace_scale,
            begin=served.begin_token,
            has_begin=served.has_begin,
        )
    assert plan.rate is not None
    rng = random.Random(plan.seed)
    return zip(due_times(plan.rate, plan.arrivals, rng, ramp_s=plan.ramp_s), drawn, strict=False)


def _limited(
    arrivals: Iterator[tuple[float, Request]], plan: Plan
) -> Iterator[tuple[float, Request]]:
    """Those due before the duration ends; of those after the ramp, `plan.requests` at most."""
    left = plan.requests
    end_s = None if plan.duration_s is None else plan.ramp_s + plan.duration_s
    for due_s, request in arrivals:
        if end_s is not None and due_s >= end_s:
            return
        if due_s >= plan.ramp_s and left is not None:
            if left == 0:
                return
            left -= 1
        yield due_s, request


async def _shown(
    name: str,
    running: Awaitable[Run],
    tally: Tally,
    *,
    requests: int | None,
    duration_s: float | None,
) -> Run:
    """The run, with a progress bar while it goes on."""
    bar = asyncio.create_task(show_progress(name, tally, requests=requests, duration_s=duration_s))
    try:
        return await running
    finally:
        bar.cancel()
        await asyncio.wait([bar])


def require_fit(plan: Plan, served: Served) -> None:
    """Raises InvalidRequest if the model's context is too short for the plan."""
    if served.context is None or plan.prompts:
        return
    longest, remedy = (
        plan.prompt_tokens.high + plan.output_tokens.high,
        ("Lower --prompt-tokens or --output-tokens."),
    )
    if plan.trace:
        longest = max(entry.prompt_tokens + entry.output_tokens for entry in plan.trace)
        remedy = "Shorten the requests of the trace with --trace-scale."
    if longest > served.context:
        raise InvalidRequest(
            f"{served.name} has a context of {served.context} tokens; prompt and output take "
            f"up to {longest}. {remedy}"
        )
