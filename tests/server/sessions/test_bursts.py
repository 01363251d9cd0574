"""What one key asks for at once does not hold up the streams of another."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import pytest

from server.auth.api_keys import Caller
from server.bundles.bundle import Bundle
from server.request import Lease
from server.sessions.opener import SessionOpener
from server.sessions.registry import Attachment, SessionRegistry
from server.sessions.table import Session
from tests.server.engines import DrivenModel, ask, until

_STEP_S = 0.02  # as that of a larger model, which computes without holding Python's lock
_BURSTS, _COPIES = 10, 128


@pytest.mark.slow
async def test_many_copies_do_not_delay_another_stream(
    text: Bundle, start: Callable[..., DrivenModel]
) -> None:
    model = start(text, stream_buffer=1024)
    registry = SessionRegistry({text.name: model})
    opener, times = SessionOpener(registry), list[float]()
    first = model.open(Lease("first", (ask(b"prompt", 80),), "forker", keep_s=600.0))
    await until(lambda: first.ended)
    Attachment(model, first, first.subscribers).leave()
    runtime: Any = model.engine.runtime
    step = runtime.step

    def slow(*args: Any) -> Any:
        times.append(time.perf_counter())
        time.sleep(_STEP_S)
        return step(*args)

    runtime.step = slow

    async def decode(during: Callable[[], Any]) -> list[float]:
        """The gaps between the tokens of a stream while something else happens."""
        times.clear()
        stream = model.submit(ask(max_tokens=90), "other")
        await until(lambda: len(times) > 5)
        await during()
        await until(lambda: stream.ended)
        return [after - before for before, after in pairwise(times)]

    async def burst() -> None:
        for _ in range(_BURSTS):
            await opener.copy(model, first, Caller("forker"), _COPIES)
            await asyncio.sleep(_STEP_S)

    gc.collect()
    gc.freeze()  # what tests load besides, which takes a collection a third of a second
    try:
        calm = await decode(lambda: asyncio.sleep(0))
        busy = await decode(burst)
    finally:
        gc.unfreeze()
    assert len(model.table) >= _BURSTS * _COPIES
    print(f"calm: median {median(calm) * 1e3:.1f} ms; with copies: most {max(busy) * 1e3:.1f} ms")
    sessions: list[Session] = model.table.all()
    for session in sessions:
        await model.forget(session)
    assert max(busy) < 3 * median(calm)
