"""The thread that writes snapshots, and those who wait for it."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.bundles.bundle import Bundle
from server.engine.stream import Past, Terms
from server.snapshots.sealer import Sealer
from server.snapshots.snapshots import Keeper
from server.snapshots.store import Store

LIMIT_S = 30.0
PAST = Past(array("B", b"abc"))


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    opened = Keeper(Store(f"file://{tmp_path}"), Sealer([bytes(32)]), 60.0)
    yield opened
    opened.close(LIMIT_S)


class Slow:
    """Puts what a keeper stores slowly, and says what."""

    def __init__(self, keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written: list[str] = []
        self.is_writing, self.go_on = threading.Event(), threading.Event()
        self._put = keeper._store.put
        monkeypatch.setattr(keeper._store, "put", self._slowly)

    def _slowly(self, owner: str, stream_id: str, *rest: Any) -> None:
        self.is_writing.set()
        assert self.go_on.wait(LIMIT_S)
        self._put(owner, stream_id, *rest)
        self.written.append(stream_id)


def test_the_newest_of_what_waits_is_written(
    text: Bundle, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(keeper, monkeypatch)
    keeper.offer(text, Terms("first"), 0, PAST)
    assert slow.is_writing.wait(LIMIT_S)
    for content in (b"a", b"ab", b"abc"):
        keeper.offer(text, Terms("second"), 0, Past(array("B", content)))
    assert not keeper.flush(0.05)
    slow.go_on.set()
    assert keeper.flush(LIMIT_S)
    assert slow.written == ["first", "second"]
    stored = keeper.load("", "second")
    assert stored is not None
    assert stored.snapshot.outputs[0].generated == b"abc"


def test_what_is_being_written_of_a_stream_is_forgotten_too(
    text: Bundle, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(keeper, monkeypatch)
    keeper.offer(text, Terms("s"), 0, PAST)
    assert slow.is_writing.wait(LIMIT_S)
    forgetting = threading.Thread(target=keeper.forget, args=(Terms("s"),))
    forgetting.start()
    slow.go_on.set()
    forgetting.join(LIMIT_S)
    assert not forgetting.is_alive()
    assert slow.written == ["s"]
    assert keeper.load("", "s") is None


def test_who_forgets_a_stream_does_not_wait_for_all_the_others(
    text: Bundle, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is always one more of them to write."""
    put, busy = keeper._store.put, threading.Event()
    busy.set()

    def endless(owner: str, stream_id: str, *rest: Any) -> None:
        time.sleep(0.005)
        put(owner, stream_id, *rest)
        if busy.is_set():
            keeper.offer(text, Terms("other" + stream_id[-1:]), 0, PAST)
            keeper.offer(text, Terms("another"), 0, PAST)

    monkeypatch.setattr(keeper._store, "put", endless)
    keeper.offer(text, Terms("other"), 0, PAST)
    forgetting = threading.Thread(target=keeper.forget, args=(Terms("s"),), daemon=True)
    forgetting.start()
    forgetting.join(5)
    left = forgetting.is_alive()
    busy.clear()
    assert not left


def test_a_snapshot_that_cannot_be_stored_stops_nothing(
    text: Bundle, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, failed = keeper._store.put, threading.Event()

    def full(owner: str, stream_id: str, *rest: Any) -> None:
        if stream_id == "bad":
            failed.set()
            raise OSError("no space left on device")
        put(owner, stream_id, *rest)

    monkeypatch.setattr(keeper._store, "put", full)
    keeper.offer(text, Terms("bad"), 0, PAST)
    assert failed.wait(LIMIT_S)
    keeper.offer(text, Terms("good"), 0, PAST)
    assert keeper.flush(LIMIT_S)
    assert keeper.load("", "good") is not None
    keeper.forget(Terms("bad"))
