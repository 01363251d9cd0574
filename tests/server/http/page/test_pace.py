"""Readers that want their tokens slowly: each token once, and the pace that they ask for."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from concertina.client import Client
from server.http.page.pace import Pace, Paces
from tests.server.http.conftest import front as front
from tests.server.http.gateways import WAIT, Front

ASKED = {"model": "tiny-text", "prompt": "a", "max_tokens": 60, "seed": 4, "ignore_eos": True}


def told(events: list[Any]) -> dict[str, list[Any]]:
    """All ids and bits of a stream's events, and its text."""
    tokens = [each for each in events if each["type"] == "tokens"]
    names = ("ids", "bits", "pieces", "text")
    return {name: [each for event in tokens for each in event[name]] for name in names}


@pytest.mark.parametrize("pace", [40, 1000])
def test_every_token_comes_once_at_any_pace(pace: int, front: Front) -> None:
    whole = front.post("/c/streams", ASKED).events
    began = time.monotonic()
    slow = front.post("/c/streams", {**ASKED, "pace": pace}).events
    assert time.monotonic() - began >= 59 / pace
    assert told(slow) == told(whole)
    assert [each["type"] for each in slow].count("accepted") == 1
    assert slow[-1]["type"] == "finished" and len(told(slow)["ids"]) == 60
    positions = [each["at"] for each in slow if each["type"] == "tokens"]
    assert positions == sorted(set(positions))


def test_a_pace_can_change_while_it_is_read(front: Front) -> None:
    replies: list[Any] = []
    with Client(front.upstream) as client:
        known = {each.stream_id for each in client.sessions.list(timeout=WAIT)}
    asked = {**ASKED, "pace": 0}
    reading = threading.Thread(target=lambda: replies.append(front.post("/c/streams", asked)))
    reading.start()
    # Held: nothing comes until somebody lets it.
    with Client(front.upstream) as client:
        running: list[str] = []
        while not running:
            listed = client.sessions.list(timeout=WAIT)
            running = [each.stream_id for each in listed if each.stream_id not in known]
            time.sleep(0.05)
    assert reading.is_alive()
    assert front.post(f"/c/streams/{running[0]}/pace", {"pace": None}).json == {"pace": None}
    reading.join(WAIT)
    assert len(told(replies[0].events)["ids"]) == 60


async def test_a_reader_that_fell_behind_need_not_catch_up() -> None:
    pace = Pace(50.0)
    await pace.turn()
    await asyncio.sleep(0.3)
    began = time.monotonic()
    for _ in range(5):
        await pace.turn()
    assert time.monotonic() - began >= 2.5 / 50


def test_only_who_reads_a_stream_changes_its_pace() -> None:
    paces, mine = Paces(), Pace(10.0)
    paces.keep("my key", "stream", mine)
    assert paces.of("my key", "stream") is mine
    assert paces.of("another", "stream") is paces.of("", "stream") is None
    paces.drop("another", "stream", mine)
    assert paces.of("my key", "stream") is mine
