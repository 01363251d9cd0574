"""`concertina loadtest`."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from concertina.cli.options import Address, Ca, Cert, CertKey, KeyFile, ModelName, UseTls, access
from concertina.cli.output import print_whole
from concertina.client import DEFAULT_ADDRESS, Model
from loadtest.measure import Plan, measure
from loadtest.reports.report import Report, render, summarise
from loadtest.targets.concertina_api import CANCELLED
from loadtest.workload import Lengths, parse_lengths

_STREAMS_PER_CHANNEL = 50
_DEFAULT_DURATION_S = 30.0
_FAILED, _VOID, _INTERRUPTED = 1, 3, 130


def loadtest(
    address: Address = DEFAULT_ADDRESS,
    key_file: KeyFile = None,
    tls: UseTls = False,
    ca: Ca = None,
    cert: Cert = None,
    cert_key: CertKey = None,
    model: ModelName = "",
    streams: Annotated[int, typer.Option(min=1, help="Streams that run at once.")] = 32,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Requests per second at random moments (an open loop), instead of --streams at "
            "once; a refusal is then no failure.",
        ),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests to send; without it, only time limits.")
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Seconds after which no request starts; "
            f"{_DEFAULT_DURATION_S:.0f} if --requests is not given either.",
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
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, lengths and sampling.")] = 0,
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
    max_lag: Annotated[
        float,
        typer.Option(min=0, help="Seconds (p99) that the tester may lag before a run is void."),
    ] = 0.02,
    json_file: Annotated[
        str, typer.Option("--json", metavar="FILE", help="Write the report as JSON; - for stdout.")
    ] = "",
) -> None:
    """Drive a server with a closed or open loop of streams, check every one, and report.

    Exit code 0: every stream was whole. 1: a stream failed, or broke the protocol. 3: the run is
    void, because this machine was too busy to measure. 130: interrupted with Ctrl-C.

    Examples:
    concertina loadtest --streams 8 --requests 64
    concertina loadtest --rate 40 --duration 60
    concertina loadtest --keep 120 --duration 600
    concertina loadtest --prompt-tokens 128-512 --output-tokens 1024 --json report.json
    """
    if duration is None and requests is None:
        duration = _DEFAULT_DURATION_S
    plan = Plan(
        address=address,
        model=model,
        streams=streams,
        rate=rate,
        channels=channels or math.ceil(streams / _STREAMS_PER_CHANNEL),
        requests=requests,
        duration_s=duration,
        prompt_tokens=_lengths("prompt-tokens", prompt_tokens, minimum=0),
        output_tokens=_lengths("output-tokens", output_tokens, minimum=1),
        prompts=_prompts(prompt_file) if prompt_file else (),
        warmup=streams if warmup is None else warmup,
        seed=seed,
        timeout_s=timeout,
        keep_s=keep,
    )
    served, run = asyncio.run(measure(plan, access(key_file, tls, ca, cert, cert_key)))
    report = summarise(run.records, run.lags_ns, max_lag_s=max_lag, interrupted=run.interrupted)
    _publish(plan, served, report, json_file)
    _exit(report, max_lag, overload=rate is not None)


def _lengths(option: str, text: str, *, minimum: int) -> Lengths:
    try:
        return parse_lengths(text, minimum=minimum)
    except ValueError as error:
        raise typer.BadParameter(f"--{option}: {error}") from None


def _prompts(path: Path) -> tuple[str, ...]:
    prompts = tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not prompts:
        raise typer.BadParameter(f"--prompt-file: {path} holds no prompt; give one on each line")
    return prompts


def _publish(plan: Plan, served: Model, report: Report, json_file: str) -> None:
    if json_file != "-":
        prompt = f"{len(plan.prompts)} prompts" if plan.prompts else f"prompt {plan.prompt_tokens}"
        load = f"{plan.streams} streams" if plan.rate is None else f"{plan.rate:g} requests/s"
        title = (
            f"{served.name} at {plan.address}: {load}, {prompt}, "
            f"output {plan.output_tokens}, seed {plan.seed}"
        )
        print_whole(render(report, title))
    if json_file:
        described = asdict(plan) | {
            "model": served.name,
            "fingerprint": served.fingerprint,
            "prompt_tokens": str(plan.prompt_tokens),
            "output_tokens": str(plan.output_tokens),
            "prompts": len(plan.prompts),
        }
        text = json.dumps({"plan": described, "report": asdict(report)}, indent=2)
        if json_file == "-":
            typer.echo(text)
        else:
            Path(json_file).write_text(text + "\n", encoding="utf-8")


def _exit(report: Report, max_lag_s: float, *, overload: bool) -> None:
    """Explain a bad report on stderr, and exit with its code."""
    failed = sum(count for kind, count in report.failures.items() if kind != CANCELLED)
    if overload:
        failed -= report.refused - report.without_retry_after
    if report.void and report.lag_s:
        typer.echo(
            f"VOID: the load generator itself ran {report.lag_s.p99 * 1e3:.1f} ms late (p99; the "
            f"limit is {max_lag_s * 1e3:.1f} ms), so the latencies mean nothing. Run it on a "
            "machine with a free core, with fewer streams, or raise --max-lag.",
            err=True,
        )
    if report.num_violations or failed:
        typer.echo(
            f"FAILED: {failed} streams failed, {report.num_violations} broke the protocol.",
            err=True,
        )
        raise typer.Exit(_FAILED)
    if report.void:
        raise typer.Exit(_VOID)
    if report.interrupted:
        raise typer.Exit(_INTERRUPTED)
