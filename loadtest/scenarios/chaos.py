"""Kill servers under running streams, and require every stream to be what it would have been.

    python tools/chaos.py bundles/python-4k --kills 20 --json build/chaos.json

Two servers share a store of snapshots. As soon as both answer, one is killed at a random moment,
every fifth time both; the clients go on by themselves. Every stream is compared, token for token,
with its twin, which ran before anything was killed. Exit code 1 when one differs or is lost.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from concertina.client import AsyncClient, ConcertinaError, Tokens
from server.api.health import is_serving
from server.ops.ports import free_ports
from server.snapshots.sealer import KEY_VARIABLE

_START_LIMIT_S = 120.0
_STREAM_LIMIT_S = 600.0
_LONG_PROMPTS = (16, 200, 1_200, 1_900)
_PROBES = 3  # prompts of prompt and tokens that are sent after each kill, to compare with


@dataclass(frozen=True)
class Wanted:
    """What a stream is asked for, so that it is the same every time."""

    prompt: list[int]
    parameters: dict[str, Any]

    @staticmethod
    def of(index: int, tokens: int) -> Wanted:
        """Prompts of several lengths; every third stream greedy, some with penalties."""
        rng = random.Random(index)
        prompt = list(rng.randbytes(_LONG_PROMPTS[index % len(_LONG_PROMPTS)]))
        parameters: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True, "seed": index}
        if index % 3 == 0:
            parameters["temperature"] = 0.0
        if index % 4 == 1:
            parameters |= {"repetition_penalty": 1.1, "frequency_penalty": 0.2}
        return Wanted(prompt, parameters)


@dataclass
class Result:
    """What the clients saw."""

    kills: int = 0
    killed_at_once: int = 0
    streams: int = 0
    resumed: int = 0
    begun_again: int = 0
    wrong: list[str] = field(default_factory=list)
    killed_at: float = 0.0
    killed_both: bool = False
    next_token_s: list[float] = field(default_factory=list)
    after_both_s: list[float] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """As JSON takes it; times as median and 99th percentile."""
        counts = ("kills", "killed_at_once", "streams", "resumed", "begun_again", "wrong")
        said = {name: getattr(self, name) for name in counts}
        for name in ("next_token_s", "after_both_s", "prefill_s"):
            times = sorted(getattr(self, name))
            if times:
                p99 = times[min(len(times) - 1, int(0.99 * len(times)))]
                said[name] = {
                    "samples": len(times),
                    "p50": round(statistics.median(times), 3),
                    "p99": round(p99, 3),
                }
        return said


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle to serve.")],
    kills: Annotated[int, typer.Option(help="How often a server is killed.")] = 20,
    streams: Annotated[int, typer.Option(help="Streams that are kept running.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens of each stream.")] = 2_000,
    ray: Annotated[bool, typer.Option(help="Two replicas on Ray Serve behind HAProxy.")] = False,
    seed: Annotated[int, typer.Option(help="Of the moments to kill at.")] = 1,
    report: Annotated[Path | None, typer.Option("--json", help="Write the report there.")] = None,
) -> None:
    """Print what became of the streams."""
    result = run(bundle, kills, streams, tokens, ray=ray, seed=seed)
    said = {"home": "ray" if ray else "two processes", "tokens": tokens, **result.report()}
    print(json.dumps(said, indent=1))
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(said, indent=1) + "\n")
    if result.wrong:
        raise typer.Exit(1)


def run(bundle: Path, kills: int, streams: int, tokens: int, *, ray: bool, seed: int) -> Result:
    """Serve, kill, compare, and leave no process behind."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as store:
        cluster = Ray(bundle, Path(store)) if ray else Processes(bundle, Path(store))
        with cluster.running():
            wanted = [Wanted.of(index, tokens) for index in range(streams)]
            return asyncio.run(_storm(cluster, wanted, kills, random.Random(seed)))


class Processes:
    """Two servers without Ray, each in a process and at a port of its own."""

    def __init__(self, bundle: Path, store: Path) -> None:
        self._ports = free_ports(4)
        self._command = _command(bundle, store, "--local")
        self._environment = _environment()
        self._servers: list[psutil.Popen] = []

    @property
    def addresses(self) -> list[str]:
        """Either may be tried first; gRPC tries the other when that one is not there."""
        one, two = (f"127.0.0.1:{port}" for port in self._ports[:2])
        return [f"ipv4:{one},{two}", f"ipv4:{two},{one}"]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Both of them."""
        try:
            self._servers = [self._start(index) for index in range(2)]
            yield
        finally:
            for server in self._servers:
                server.kill()
                server.wait(10)

    def _start(self, index: int) -> psutil.Popen:
        ports = ("--port", self._ports[index], "--metrics-port", self._ports[index + 2])
        return _popen([*self._command, *map(str, ports)], self._environment)

    def is_healthy(self) -> bool:
        """Whether both answer."""
        return all(is_serving(f"127.0.0.1:{port}") for port in self._ports[:2])

    def kill(self, rng: random.Random, both: bool) -> None:
        """End one of them, or both, and have others begin in their place."""
        for index in (0, 1) if both else [rng.randrange(2)]:
            self._servers[index].send_signal(signal.SIGKILL)
            self._servers[index].wait(10)
            self._servers[index] = self._start(index)


class Ray:
    """Two replicas on Ray Serve, behind HAProxy; Ray begins others in their place."""

    def __init__(self, bundle: Path, store: Path) -> None:
        self._ports = free_ports(2)
        port, metrics_port = map(str, self._ports)
        self._command = [*_command(bundle, store, "--replicas", "2"), "--port", port]
        self._command += ["--metrics-port", metrics_port]
        self._server: psutil.Popen | None = None

    @property
    def addresses(self) -> list[str]:
        """That of HAProxy."""
        return [f"127.0.0.1:{self._ports[0]}"]

    @contextmanager
    def running(self) -> Iterator[None]:
        """The whole of it."""
        self._server = _popen(self._command, _environment())
        try:
            yield
        finally:
            family = [self._server, *self._server.children(recursive=True)]
            self._server.terminate()
            _, alive = psutil.wait_procs(family, timeout=60)
            for process in alive:
                process.kill()

    def _replicas(self) -> list[psutil.Process]:
        assert self._server is not None
        found = []
        for process in self._server.children(recursive=True):
            try:
                if "ServeReplica" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:  # it ended meanwhile
                continue
        return found

    def is_healthy(self) -> bool:
        """Whether there are two, and the port answers."""
        return len(self._replicas()) == 2 and is_serving(self.addresses[0])

    def kill(self, rng: random.Random, both: bool) -> None:
        """End one of them, or both."""
        replicas = self._replicas()
        for process in replicas if both else [rng.choice(replicas)]:
            process.send_signal(signal.SIGKILL)


Cluster = Processes | Ray


def _command(bundle: Path, store: Path, *options: str) -> list[str]:
    served = [sys.executable, "-m", "concertina.cli.main", "serve", str(bundle), "--threads", "1"]
    snapshots = ["--snapshots", f"file://{store}", "--snapshot-interval", "128"]
    return [*served, *snapshots, "--slots", "64", "--drain-seconds", "1", *options]


def _environment() -> dict[str, str]:
    return os.environ | {KEY_VARIABLE: base64.b64encode(secrets.token_bytes(32)).decode()}


def _popen(command: list[str], environment: dict[str, str]) -> psutil.Popen:
    quiet = subprocess.DEVNULL
    return psutil.Popen(command, env=environment, stdout=quiet, stderr=quiet)


async def _storm(cluster: Cluster, wanted: list[Wanted], kills: int, rng: random.Random) -> Result:
    await _healthy(cluster)
    result = Result()
    async with _clients(cluster) as clients:
        pick = [clients[index % len(clients)] for index in range(len(wanted))]
        runs = (_read(pick[i], one, result) for i, one in enumerate(wanted))
        twins = await asyncio.gather(*runs)
        assert not result.resumed
        over = asyncio.Event()

        async def keep_running(index: int) -> None:
            while not over.is_set():
                got = await _read(pick[index], wanted[index], result)
                result.streams += 1
                if got != twins[index]:
                    same = (a == b for a, b in zip(got[0], twins[index][0], strict=False))
                    at = sum(takewhile(bool, same))
                    result.wrong.append(f"stream {index} differs from token {at} on")

        running = [asyncio.create_task(keep_running(index)) for index in range(len(wanted))]
        try:
            for _ in range(kills):
                await _healthy(cluster)
                await asyncio.sleep(rng.uniform(0.5, 4.0))
                both = (result.kills + 1) % 5 == 0 or (kills < 5 and result.kills == kills - 1)
                result.killed_at, result.killed_both = time.monotonic(), both
                await asyncio.to_thread(cluster.kill, rng, both)
                result.kills += 1
                result.killed_at_once += both
            await _healthy(cluster)
        finally:
            over.set()
        ended = await asyncio.gather(*running, return_exceptions=True)
        result.wrong += [f"a stream was lost: {e}" for e in ended if isinstance(e, Exception)]
    return result


async def _healthy(cluster: Cluster) -> None:
    async with asyncio.timeout(_START_LIMIT_S):
        while not await asyncio.to_thread(cluster.is_healthy):
            await asyncio.sleep(0.1)


@asynccontextmanager
async def _clients(cluster: Cluster) -> AsyncIterator[list[AsyncClient]]:
    clients = [AsyncClient(address) for address in cluster.addresses]
    try:
        yield clients
    finally:
        for client in clients:
            await client.close()


async def _read(client: AsyncClient, wanted: Wanted, result: Result) -> tuple[list[int], str]:
    """A stream to its end: ids and text. Each event has to follow from those before it."""
    async with asyncio.timeout(_STREAM_LIMIT_S):
        while True:
            try:
                return await _read_once(client, wanted, result)
            except _NotBegunError:
                result.begun_again += 1
                await asyncio.sleep(0.5)


class _NotBegunError(Exception):
    """No server took the stream."""


async def _read_once(client: AsyncClient, wanted: Wanted, result: Result) -> tuple[list[int], str]:
    ids, text, resumed = list[int](), "", 0
    probe: asyncio.Task[None] | None = None
    try:
        stream = client.generate(wanted.prompt, resume_for=_START_LIMIT_S, **wanted.parameters)
        async for event in stream:
            if isinstance(event, Tokens):
                if event.first_position != len(wanted.prompt) + len(ids):
                    raise AssertionError(f"position {event.first_position} after {len(ids)} tokens")
                ids += event.ids
                text += event.text
            if stream.resumed > resumed:
                resumed = stream.resumed
                result.resumed += 1
                waited = time.monotonic() - result.killed_at
                times = result.after_both_s if result.killed_both else result.next_token_s
                times.append(waited)
                if len(result.prefill_s) < _PROBES * (result.kills + 1):
                    known = [*wanted.prompt, *ids]
                    probe = asyncio.create_task(_prefill(client, known, result))
    except ConcertinaError as error:
        if not ids:
            raise _NotBegunError from error
        raise
    finally:
        if probe is not None:
            await probe
    return ids, text


async def _prefill(client: AsyncClient, known: list[int], result: Result) -> None:
    """How long it takes to get the next token from all that is known, as a new request."""
    began = time.monotonic()
    try:
        async for event in client.generate(
            known, max_tokens=1, ignore_eos=True, keep=0, timeout=60
        ):
            if isinstance(event, Tokens):
                result.prefill_s.append(time.monotonic() - began)
    except ConcertinaError:
        return  # that server was killed, too


if __name__ == "__main__":
    typer.run(main)
