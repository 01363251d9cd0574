"""`concertina loadtest`."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from concertina.cli.options import Address, Ca, Cert, CertKey, KeyFile, ModelName, UseTls, access
from concertina.client import DEFAULT_ADDRESS
from loadtest.arrivals import parse_arrivals
from loadtest.measure import Api, Plan
from loadtest.reports.objectives import parse_objectives
from loadtest.reports.outcome import exit_code, publish
from loadtest.sweep import Sweep, at, parse_sweep, run_series
from loadtest.trace import read_trace
from loadtest.workload import Lengths, parse_lengths

_STREAMS_PER_CHANNEL = 50
_DEFAULT_DURATION_S = 30.0
_Parsed = TypeVar("_Parsed")


def loadtest(
    address: Address = DEFAULT_ADDRESS,
    key_file: KeyFile = None,
    tls: UseTls = False,
    ca: Ca = None,
    cert: Cert = None,
    cert_key: CertKey = None,
    model: ModelName = "",
    target: Annotated[
        Api,
        typer.Option(
            help="The server's API: ours, or OpenAI's completions, with --address http://HOST:PORT."
        ),
    ] = "concertina",
    streams: Annotated[int, typer.Option(min=1, help="Streams that run at once.")] = 32,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Requests per second, whatever happens to earlier ones (an open loop), instead of "
            "--streams at once; a refusal is then no failure.",
        ),
    ] = None,
    arrivals: Annotated[
        str, typer.Option(help="How the requests of --rate come: constant, poisson, gamma:B.")
    ] = "poisson",
    trace: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Replay requests of a trace (Mooncake's JSONL)."
        ),
    ] = None,
    trace_speed: Annotated[
        float, typer.Option(min=0.001, help="How much faster the trace is replayed.")
    ] = 1.0,
    trace_scale: Annotated[
        float, typer.Option(min=0.0001, help="What the trace's lengths are multiplied with.")
    ] = 1.0,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests to send; without it, only time limits.")
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Seconds that are measured, after which no request starts; "
            f"{_DEFAULT_DURATION_S:.0f} if neither --requests nor --trace is given.",
        ),
    ] = None,
    ramp: Annotated[
        float,
        typer.Option(min=0, help="Seconds before that in which the load grows; not measured."),
    ] = 0.0,
    grace: Annotated[
        float | None,
        typer.Option(
            min=0, help="Seconds after --duration when streams are cut that still run; else never."
        ),
    ] = None,
    prompt_tokens: Annotated[
        str, typer.Option(help="Random tokens of a prompt: a number, or a range like 128-512.")
    ] = "256",
    output_tokens: Annotated[
        str, typer.Option(help="Tokens to generate: a number, or a range like 128-512.")
    ] = "512",
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Text prompts, one a line, to draw from instead."
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(min=0, help="Requests that run first and do not count; default --streams."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, lengths, times and sampling.")] = 0,
    channels: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Connections; default one for every {_STREAMS_PER_CHANNEL} streams."
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a stream may take.")] = 600.0,
    keep: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds that the server keeps a lost stream, in which it can go on; 0: a lost "
            "stream has failed.",
        ),
    ] = 0.0,
    sweep: Annotated[
        str,
        typer.Option(
            metavar="AXIS=VALUES",
            help="One run for each value: context=1k..64k, concurrency=1..64, rate=1..64; the last "
            "two end at the knee.",
        ),
    ] = "",
    slo: Annotated[
        str,
        typer.Option(
            metavar="LIMITS",
            help="Count the requests that meet these: ttft=500ms,itl=50ms,tpot=50ms,e2e=10s.",
        ),
    ] = "",
    max_lag: Annotated[
        float,
        typer.Option(min=0, help="Seconds (p99) that the tester may lag before a run is void."),
    ] = 0.02,
    json_file: Annotated[
        str, typer.Option("--json", metavar="FILE", help="Write the report as JSON; - for stdout.")
    ] = "",
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write a row for each request.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with charts.")
    ] = None,
) -> None:
    """Drive a server with a closed or open loop of streams, check every one, and report.

    Exit code 0: every stream was whole. 1: a stream failed, or broke the protocol. 3: the run is
    void, because this machine was too busy to measure. 130: interrupted with Ctrl-C.

    Examples:
    concertina loadtest --streams 8 --requests 64
    concertina loadtest --rate 40 --duration 60 --ramp 10 --slo ttft=500ms,itl=50ms
    concertina loadtest --sweep context=1k..16k --streams 4 --requests 8 --html context.html
    concertina loadtest --target openai --address http://127.0.0.1:8000 --sweep rate=1..64
    concertina loadtest --prompt-tokens 128-512 --output-tokens 1024 --json report.json
    """
    if duration is None and requests is None and trace is None:
        duration = _DEFAULT_DURATION_S
    if trace and rate is not None:
        raise typer.BadParameter("--trace says when requests come: leave out --rate")
    lengths = (prompt_tokens, output_tokens)
    plan = Plan(
        address=address,
        model=model,
        streams=streams,
        rate=rate,
        channels=channels or math.ceil(streams / _STREAMS_PER_CHANNEL),
        requests=requests,
        duration_s=duration,
        prompt_tokens=_parsed("prompt-tokens", lambda: _lengths(lengths[0], 0)),
        output_tokens=_parsed("output-tokens", lambda: _lengths(lengths[1], 1)),
        prompts=_prompts(prompt_file) if prompt_file else (),
        warmup=streams if warmup is None else warmup,
        seed=seed,
        timeout_s=timeout,
        keep_s=keep,
        api=target,
        arrivals=_parsed("arrivals", lambda: parse_arrivals(arrivals)),
        ramp_s=ramp,
        grace_s=grace,
        trace=(
            _parsed("trace", lambda: read_trace(trace, speed=trace_speed, scale=trace_scale))
            if trace
            else ()
        ),
        trace_scale=trace_scale,
    )
    objectives = _parsed("slo", lambda: parse_objectives(slo))
    swept = _parsed("sweep", lambda: _sweep(plan, sweep)) if sweep else None
    series = asyncio.run(
        run_series(
            plan,
            access(key_file, tls, ca, cert, cert_key),
            swept,
            objectives=objectives,
            max_lag_s=max_lag,
        )
    )
    publish(plan, series, json_file=json_file, csv_file=csv_file, html_file=html_file)
    raise typer.Exit(exit_code(plan, series, max_lag))


def _parsed(option: str, parse: Callable[[], _Parsed]) -> _Parsed:
    try:
        return parse()
    except ValueError as error:
        raise typer.BadParameter(f"--{option}: {error}") from None


def _lengths(text: str, minimum: int) -> Lengths:
    return parse_lengths(text, minimum=minimum)


def _sweep(plan: Plan, text: str) -> Sweep:
    """Raises ValueError for what is no sweep, and for a point that cannot be."""
    if plan.trace:
        raise ValueError("a trace has its own load: leave out --trace")
    swept = parse_sweep(text)
    for value in swept.values:
        at(plan, swept.axis, value)
    return swept


def _prompts(path: Path) -> tuple[str, ...]:
    prompts = tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not prompts:
        raise typer.BadParameter(f"--prompt-file: {path} holds no prompt; give one on each line")
    return prompts
