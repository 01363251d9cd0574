from __future__ import annotations

import asyncio

import numpy as np
import pytest

from server.engine.events import Delta, Piece, Request
from server.sessions.deliveries import Outbox
from server.sessions.subscriber import Reader


async def test_a_loop_is_woken_once_for_all_its_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    readers = [Reader(Request(np.array([256])), loop) for n in range(3)]
    wake, wakes = loop.call_soon_threadsafe, []

    def counted(*arguments: object) -> object:
        wakes.append(arguments)
        return wake(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    outbox = Outbox()
    for token in range(4):
        for reader in readers:
            outbox.put(reader, Piece(token))
    assert outbox.publish() == set()
    assert len(wakes) == 1
    assert readers[0].take() is None
    await asyncio.sleep(0)
    assert [reader.take() for reader in readers] == [Delta(0, (0, 1, 2, 3), "")] * 3
    assert outbox.publish() == set()
    assert len(wakes) == 1


async def test_readers_of_a_closed_loop_are_told_of() -> None:
    gone = asyncio.new_event_loop()
    gone.close()
    here = Reader(Request(np.array([256])), asyncio.get_running_loop())
    lost = Reader(Request(np.array([256])), gone)
    outbox = Outbox()
    outbox.put(lost, Piece(1))
    outbox.put(here, Piece(2))
    assert outbox.publish() == {lost}
    await asyncio.sleep(0)
    assert here.take() == Delta(0, (2,), "")
