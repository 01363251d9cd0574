"""A server has a mix of callers for an hour, and its memory must not grow.

Streams end, are cancelled, are cut and resumed, are paused, continued and deleted. The server's
memory is sampled, and what follows a warm-up is fitted (`trend`).
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import typer

from concertina.client import AsyncClient, ConcertinaError, Tokens
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1.generation_service_pb2_grpc import GenerationServiceStub
from loadtest.scenarios.trend import grows, theil_sen
from loadtest.servers import Server, new_snapshot_key, serving

_CALLERS = 8
_WARM_UP = 0.25  # of the time
_SAMPLE_S = 0.5

Kind = Callable[[AsyncClient, random.Random], Awaitable[None]]
"""One call of a caller, or a few that belong together."""


def soak(
    bundle: Annotated[Path, typer.Argument(exists=True, help="Bundle to serve.")],
    seconds: Annotated[
        int, typer.Option(min=1, envvar="SOAK_SECONDS", help="How long it takes.")
    ] = 3600,
    allowed: Annotated[
        float, typer.Option(min=0, help="MiB that memory may grow by after the warm-up.")
    ] = 4.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw memory over time, as PNG.")
    ] = None,
) -> None:
    """Serve a mix of callers, and require that the server's memory does not grow.

    The first quarter of the time is a warm-up. The rest is fitted by Theil and Sen (the median of
    the slopes between all pairs of samples). Memory grows if the fit rises by more than --allowed
    over that time, and the lower end of the slope's 95% interval, by Kendall's tau, is above 0:
    exit code 1.

    Examples:
    python -m loadtest.scenarios.soak bundles/python-4k --seconds 300
    python -m loadtest.scenarios.soak bundles/python-4k --json soak.json --plot soak.png
    """
    with tempfile.TemporaryDirectory(prefix="soak-") as store:
        options = ["--local", "--slots", str(_CALLERS // 2), "--threads", "1"]
        options += ["--snapshots", f"file://{store}", "--snapshot-interval", "64"]
        options += ["--snapshot-ttl", "60", "--prefix-cache-bytes", "1000000"]
        with serving(bundle, *options, environment=new_snapshot_key()) as server:
            samples, calls = asyncio.run(_soak(server, seconds))
    times, memory = np.array(samples).T
    warm = times >= _WARM_UP * seconds
    slope, minutes = theil_sen(times[warm] / 60, memory[warm] / 1024), np.ptp(times[warm]) / 60
    report = {
        "seconds": seconds,
        "calls": calls,
        "samples": int(warm.sum()),
        "first_mib": round(float(memory[warm][0]) / 2**20, 1),
        "last_mib": round(float(memory[warm][-1]) / 2**20, 1),
        "slope_kib_a_minute": round(slope.fitted, 1),
        "interval": [round(slope.low, 1), round(slope.high, 1)],
        "allowed": allowed,
        "grows": grows(slope, float(minutes), allowed),
    }
    print(json.dumps(report, indent=1))
    for path in (json_file, plot):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    if plot is not None:
        from loadtest.bench.plots import plot_memory  # draws with an extra that serving lacks

        plot_memory(plot, times / 60, memory / 2**20)
    if report["grows"]:
        raise typer.Exit(1)


async def _soak(server: Server, seconds: int) -> tuple[list[tuple[float, float]], dict[str, int]]:
    """Samples of the server's memory, (seconds, bytes), and the number of calls of each kind."""
    began, samples, calls = time.monotonic(), list[tuple[float, float]](), dict[str, int]()
    ends = began + seconds
    channel = grpc.aio.insecure_channel(server.address)
    async with AsyncClient(server.address) as client, channel:
        kinds: dict[str, Kind] = {
            "read": _read,
            "cancel": _cancel,
            "resume": partial(_resume, GenerationServiceStub(channel)),
            "session": _session,
        }
        callers = [_call(client, kinds, n, ends, calls) for n in range(_CALLERS)]
        mix = [asyncio.create_task(caller) for caller in callers]
        while (now := time.monotonic()) < ends and not any(task.done() for task in mix):
            samples.append((now - began, float(server.process.memory_info().rss)))
            await asyncio.sleep(_SAMPLE_S)
        await asyncio.gather(*mix)
    return samples, calls


async def _call(
    client: AsyncClient, kinds: dict[str, Kind], seed: int, ends: float, calls: dict[str, int]
) -> None:
    """Make calls of random kinds, one after the other, until the end."""
    rng = random.Random(seed)
    while time.monotonic() < ends:
        name = rng.choice([*kinds])
        await kinds[name](client, rng)
        calls[name] = calls.get(name, 0) + 1


def _wanted(rng: random.Random) -> dict[str, Any]:
    prompt = list(rng.randbytes(rng.choice([8, 100, 700])))
    return {"prompt": prompt, "max_tokens": rng.randint(20, 400), "ignore_eos": True}


async def _read(client: AsyncClient, rng: random.Random) -> None:
    async for _ in client.generate(**_wanted(rng)):
        pass


async def _cancel(client: AsyncClient, rng: random.Random) -> None:
    stream, events = client.generate(**_wanted(rng)), rng.randint(0, 8)
    async for _ in stream:
        if (events := events - 1) < 0:
            break
    await stream.close()


async def _resume(stub: GenerationServiceStub, client: AsyncClient, rng: random.Random) -> None:
    """Cut a stream now and then after its first tokens, and resume it from there.

    The client would resume by itself, so this speaks the protocol.
    """
    wanted = _wanted(rng)
    request = pb.GenerateRequest(
        prompt={"tokens": {"ids": wanted["prompt"]}},
        stopping={"max_tokens": wanted["max_tokens"], "ignore_eos": True},
        keep={"seconds": 10},
    )
    name, sequence, tokens, characters = "", 0, 0, 0
    call = stub.Generate(request, timeout=300)
    while True:
        cut = False
        async for event in call:
            name, sequence = name or event.accepted.stream_id, event.sequence
            tokens += len(event.tokens.ids)
            characters += len(event.tokens.text)
            if event.HasField("finished"):
                await client.sessions.delete(name)
                return
            if tokens and rng.random() < 0.05:
                cut = True
                break
        call.cancel()
        if not cut:
            raise RuntimeError("a stream stops before its last event")
        cursors = [{"tokens": tokens, "characters": characters}]
        rest = pb.ResumeRequest(stream_id=name, after_sequence=sequence, cursors=cursors)
        call = stub.Resume(rest, timeout=300)


async def _session(client: AsyncClient, rng: random.Random) -> None:
    """Pause after some tokens, perhaps fork, continue, delete; some are left to expire."""
    stream, name = client.generate(**_wanted(rng), keep=10), ""
    async for event in stream:
        name = name or getattr(event, "stream_id", "")
        if isinstance(event, Tokens):
            break
    with suppress(ConcertinaError):  # it may have ended already
        await client.sessions.pause(name)
        for fork in await client.sessions.fork(name, 2) if rng.random() < 0.5 else []:
            await client.sessions.delete(fork)
        async for _ in client.sessions.continue_(name):
            pass
    await stream.close()
    if rng.random() < 0.7:
        await client.sessions.delete(name)


if __name__ == "__main__":
    typer.run(soak)
