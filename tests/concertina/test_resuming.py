"""Streams that go on by themselves: whatever breaks their calls, nothing is missing or doubled."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from concertina import resuming
from server.config import EngineConfig
from server.engine import Engine
from server.servicer import open_engines
from tests.concertina.faults import (
    FAULTS,
    Faults,
    Read,
    random_faults,
    read_async,
    read_blocking,
    serving,
)
from tests.server.engines import change_logits, is_empty, until

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
def engines(text_bundle: Path, image_bundle: Path) -> Iterator[dict[str, Engine]]:
    """Engines that take their time, so that there is something left to break."""
    opened = open_engines([text_bundle, image_bundle], EngineConfig(threads=1))

    def take_time(logits: Any, positions: Any) -> Any:
        time.sleep(0.002)
        return logits

    for engine in opened.values():
        change_logits(engine, take_time)
    yield opened
    for engine in opened.values():
        engine.close()


@pytest.fixture
async def server(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Faults]:
    """Its engines hold nothing in the end: what was kept is deleted."""
    monkeypatch.setattr(resuming, "_FIRST_WAIT_S", 0.002)
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
