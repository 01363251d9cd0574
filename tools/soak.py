"""Serve a mix of callers for an hour, and require that memory does not grow.

    python tools/soak.py bundles/python-4k --json build/soak.json --plot build/soak.png

A real server with a store of snapshots; streams that end, are cancelled, are cut and resumed, are
paused, continued and deleted. Its memory is sampled; what it has after a warm-up of a quarter of
the time is fitted by Theil and Sen (the median of the slopes between all pairs of samples). It
grows if the fit rises by more than `--allowed` MiB over that time, and the lower end of the
slope's 95% interval, by Kendall's tau, is above 0. Exit code 1 then.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import psutil
import typer

from concertina.client import AsyncClient, ConcertinaError, Tokens
from concertina.v1 import generation_service_pb2 as pb
from server.api.health import wait_until_serving
from server.ops.ports import free_ports
from server.snapshots.sealer import KEY_VARIABLE

_CALLERS = 8
_WARM_UP = 0.25
_SAMPLE_S = 0.5
_MOST_SAMPLES = 2_000  # the fit looks at every pair
_START_LIMIT_S = 120.0
_Z95 = 1.96


@dataclass(frozen=True)
class Slope:
    """KiB a minute: the fit, and its 95% interval."""

    fitted: float
    low: float
    high: float


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle to serve.")],
    seconds: Annotated[int, typer.Option(envvar="SOAK_SECONDS", help="How long.")] = 3600,
    allowed: Annotated[
        float, typer.Option(help="MiB that memory may grow by behind the warm-up.")
    ] = 4.0,
    report: Annotated[Path | None, typer.Option("--json", help="Write the report there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw memory over time there, as PNG.")] = None,
) -> None:
    """Print the slope of memory over time."""
    with tempfile.TemporaryDirectory(prefix="soak-") as store:
        samples, calls = asyncio.run(_soak(bundle, Path(store), seconds))
    times, memory = np.array(samples).T
    warm = times >= _WARM_UP * seconds
    slope, minutes = theil_sen(times[warm] / 60, memory[warm] / 1024), np.ptp(times[warm]) / 60
    said = {
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
    print(json.dumps(said, indent=1))
    for path in (report, plot):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if report is not None:
        report.write_text(json.dumps(said, indent=1) + "\n")
    if plot is not None:
        _draw(plot, times / 60, memory / 2**20)
    if said["grows"]:
        raise typer.Exit(1)


def grows(slope: Slope, minutes: float, allowed: float) -> bool:
    """Whether memory grows: by more MiB than are allowed, and beyond what chance explains."""
    return slope.fitted * minutes > 1024 * allowed and slope.low > 0


def theil_sen(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Slope:
    """The median slope between all pairs of points, and its 95% interval (Sen 1968)."""
    step = -(-len(x) // _MOST_SAMPLES)
    x, y = x[::step], y[::step]
    later, earlier = np.tril_indices(len(x), -1)
    slopes = np.sort((y[later] - y[earlier]) / (x[later] - x[earlier]))
    n = len(x)
    _, ties = np.unique(y, return_counts=True)
    spread = n * (n - 1) * (2 * n + 5) - int((ties * (ties - 1) * (2 * ties + 5)).sum())
    margin = _Z95 * (spread / 18) ** 0.5
    low = int(max(0, round((len(slopes) - margin) / 2)))
    high = int(min(len(slopes) - 1, round((len(slopes) + margin) / 2)))
    return Slope(float(np.median(slopes)), float(slopes[low]), float(slopes[high]))


async def _soak(
    bundle: Path, store: Path, seconds: int
) -> tuple[list[tuple[float, float]], dict[str, int]]:
    """(seconds, bytes) of the server, and how many calls of each kind it had."""
    port, metrics_port = free_ports(2)
    command = [sys.executable, "-m", "concertina.cli.main", "serve", str(bundle), "--local"]
    command += ["--port", str(port), "--metrics-port", str(metrics_port)]
    command += ["--snapshots", f"file://{store}", "--snapshot-interval", "64"]
    command += [
        "--snapshot-ttl",
        "60",
        "--prefix-cache-bytes",
        "1000000",
        "--slots",
        str(_CALLERS // 2),
        "--threads",
        "1",
    ]
    quiet = subprocess.DEVNULL
    key = {KEY_VARIABLE: base64.b64encode(secrets.token_bytes(32)).decode()}
    server = psutil.Popen(command, env=os.environ | key, stdout=quiet, stderr=quiet)
    try:
        address = f"127.0.0.1:{port}"
        await asyncio.to_thread(wait_until_serving, address, _START_LIMIT_S)
        began, samples, calls = time.monotonic(), list[tuple[float, float]](), dict[str, int]()
        async with AsyncClient(address) as client:
            ends = began + seconds
            mix = [asyncio.create_task(_caller(client, n, ends, calls)) for n in range(_CALLERS)]
            while (now := time.monotonic()) < ends and not any(task.done() for task in mix):
                samples.append((now - began, float(server.memory_info().rss)))
                await asyncio.sleep(_SAMPLE_S)
            await asyncio.gather(*mix)
        return samples, calls
    finally:
        server.terminate()
        server.wait(60)


async def _caller(client: AsyncClient, seed: int, ends: float, calls: dict[str, int]) -> None:
    """One caller, who does this and that until the end."""
    rng = random.Random(seed)
    deeds = {"read": _read, "cancel": _cancel, "resume": _resume, "session": _session}
    while time.monotonic() < ends:
        name = rng.choice([*deeds])
        await deeds[name](client, rng)
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


async def _resume(client: AsyncClient, rng: random.Random) -> None:
    """Cut after its first tokens, and read on by name from there."""
    stub, wanted = client._connection.generation, _wanted(rng)
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
            raise RuntimeError("a stream ended without its end")
        had = {"tokens": tokens, "characters": characters}
        call = stub.Resume(
            pb.ResumeRequest(stream_id=name, after_sequence=sequence, cursors=[had]), timeout=300
        )


async def _session(client: AsyncClient, rng: random.Random) -> None:
    """Pause after some tokens, fork or not, go on, delete; some are just left to be forgotten."""
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


def _draw(path: Path, minutes: npt.NDArray[np.float64], mib: npt.NDArray[np.float64]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 2.5), layout="constrained")
    axes.plot(minutes, mib, linewidth=0.8)
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, None))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    typer.run(main)
