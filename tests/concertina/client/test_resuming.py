"""Streams that go on by themselves: whatever breaks their calls, nothing is missing or doubled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from concertina.client import AsyncClient, resuming
from server.auth.api_keys import ANYONE
from server.config import EngineConfig
from server.sessions.served_model import ServedModel, serve_bundles
from server.snapshots.sealer import Sealer
from server.snapshots.store import Store
from server.snapshots.writer import SnapshotWriter
from tests.concertina.faults import (
    FAULTS,
    Content,
    Faults,
    Read,
    random_faults,
    read_async,
    read_blocking,
    serving,
    slow_down,
    wire,
)
from tests.server.engines import is_empty, until

SEALER = Sealer([bytes(range(32))])
TEXT, IMAGE = "tiny-text", "tiny-image"
CASES: dict[str, dict[str, Any]] = {
    "text": {"model": TEXT, "prompt": "An abacus", "max_tokens": 60, "seed": 3},
    "three": {"model": TEXT, "prompt": "An abacus", "max_tokens": 30, "seed": 4, "n": 3},
    "logprobs": {
        "model": TEXT,
        "prompt": "An abacus",
        "max_tokens": 40,
        "logprobs": 2,
        "prompt_logprobs": 1,
        "seed": 5,
    },
    "image": {"model": IMAGE, "seed": 6},
}


@pytest.fixture(scope="module")
def engines(text_bundle: Path, image_bundle: Path) -> Iterator[dict[str, ServedModel]]:
    """An engine for each of the bundles."""
    opened = serve_bundles([text_bundle, image_bundle], EngineConfig(threads=1))

    for engine in opened.values():
        slow_down(engine)
    yield opened
    for engine in opened.values():
        engine.close()


@pytest.fixture
async def server(
    engines: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Faults]:
    """Its engines hold nothing in the end: what was kept is deleted."""
    monkeypatch.setattr(resuming, "FIRST_WAIT_S", 0.002)
    async with serving(engines) as server:
        yield server
        await until(lambda: all(is_empty(engine) for engine in engines.values()), 10)


@pytest.fixture(params=[read_async, read_blocking], ids=["asyncio", "blocking"])
def read(request: pytest.FixtureRequest, server: Faults) -> Read:
    """Reads a stream of the server to its end, with one of the clients."""
    return partial(request.param, server.address)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
async def test_a_broken_stream_is_as_its_undisturbed_twin(
    server: Faults, read: Read, case: str, seed: int
) -> None:
    expected = await read(**CASES[case], keep=0)
    server.servicer.faults = random_faults(seed)
    broken = await read(**CASES[case])
    assert broken == expected
    assert broken.resumed > 2


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("events", [1, 3])
async def test_every_fault_is_survived(server: Faults, read: Read, fault: str, events: int) -> None:
    expected = await read(**CASES["text"], keep=0)
    server.servicer.faults = iter([(events, fault)] * 5)
    broken = await read(**CASES["text"])
    assert broken == expected
    assert broken.resumed >= 2


@pytest.mark.parametrize("every_s", [0.02, 0.06])
async def test_connections_are_cut_at_any_moment(
    engines: dict[str, ServedModel], server: Faults, read: Read, every_s: float
) -> None:
    """What has been sent is lost in the middle of a message, and so are requests."""
    expected = await read(**CASES["three"], keep=0)
    async with wire(server.address) as laid:

        async def cut() -> None:
            asked, wait_s = len(server.servicer.asked), every_s
            await until(lambda: len(server.servicer.asked) > asked)
            while True:
                laid.cut()
                await asyncio.sleep(wait_s)
                wait_s *= 1.2

        cutting = asyncio.create_task(cut())
        broken = await read.func(laid.address, **CASES["three"])  # type: ignore[attr-defined]
        cutting.cancel()
    for model in engines.values():  # the wish to delete it may have been cut off as well
        for session in model.sessions(ANYONE.name):
            await model.forget(session)
    assert broken == expected
    assert broken.resumed


@pytest.mark.parametrize("case", ["text", "three", "logprobs"])
@pytest.mark.parametrize("events", [2, 6])
async def test_another_replica_goes_on(
    text_bundle: Path, tmp_path: Path, case: str, events: int
) -> None:
    """The first one dies under the stream, at the same address the second answers."""
    config = EngineConfig(threads=1, snapshot_interval=8)
    keepers = [SnapshotWriter(Store(f"file://{tmp_path}"), SEALER, 60.0) for _ in range(2)]
    first, second = (serve_bundles([text_bundle], config, keeper) for keeper in keepers)
    slow_down(first[TEXT])
    try:
        async with (
            serving(first, keepers[0]) as dying,
            serving(second, keepers[1]) as heir,
            wire(heir.address) as laid,
        ):
            expected = await read_async(laid.address, **CASES[case], keep=0)
            laid.cut()
            laid.target = dying.address
            content = Content()
            async with (
                AsyncClient(laid.address) as client,
                client.generate(**CASES[case]) as stream,
            ):
                async for event in stream:
                    content.take(event)
                    if (events := events - 1) == 0:
                        first[TEXT].close()
                        laid.target = heir.address
                        laid.cut()
            assert content == expected
            assert stream.resumed == 1
            await until(lambda: is_empty(second[TEXT]), 10)
    finally:
        for engine in (*first.values(), *second.values()):
            engine.close()
        for keeper in keepers:
            keeper.close(10)
