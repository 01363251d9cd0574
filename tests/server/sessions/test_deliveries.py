from __future__ import annotations

import asyncio

import pytest

from server.engine.updates import StreamUpdate
from server.request import Request, prompt_of
from server.sessions.subscriber import Deliveries, Delta, Subscriber

REQUEST = Request(prompt_of(256, [], "B"))


async def test_a_loop_is_woken_once_for_all_subscribers(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    deliveries = Deliveries()
    subscribers = [Subscriber(REQUEST, loop, deliveries) for n in range(3)]
    wake, wakes = loop.call_soon_threadsafe, []

    def counted(*arguments: object) -> object:
        wakes.append(arguments)
        return wake(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    for token in range(4):
        for subscriber in subscribers:
            subscriber.put(StreamUpdate(token))
    assert deliveries.publish() == set()
    assert len(wakes) == 1
    assert subscribers[0].take() is None
    await asyncio.sleep(0)
    assert [subscriber.take() for subscriber in subscribers] == [Delta(0, (0, 1, 2, 3), "")] * 3
    assert deliveries.publish() == set()
    assert len(wakes) == 1


async def test_publish_returns_subscribers_of_a_closed_loop() -> None:
    gone = asyncio.new_event_loop()
    gone.close()
    deliveries = Deliveries()
    here = Subscriber(REQUEST, asyncio.get_running_loop(), deliveries)
    lost = Subscriber(REQUEST, gone, deliveries)
    lost.put(StreamUpdate(1))
    here.put(StreamUpdate(2))
    assert deliveries.publish() == {lost}
    await asyncio.sleep(0)
    assert here.take() == Delta(0, (2,), "")
