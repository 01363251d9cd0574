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
from server.checkpoint import Checkpoint
from server.request import Lease, Request, prompt_of
from server.snapshots.names import TOMBSTONE
from server.snapshots.sealer import Sealer
from server.snapshots.store import Store
from server.snapshots.writer import SnapshotWriter

LIMIT_S = 30.0
CHECKPOINT = Checkpoint(array("B", b"abc"))


def lease(stream_id: str) -> Lease:
    return Lease(stream_id, (Request(prompt_of(256, [], "B"), max_tokens=50),), keep_s=60.0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}")


@pytest.fixture
def writer(store: Store) -> Iterator[SnapshotWriter]:
    opened = SnapshotWriter(store, Sealer([bytes(32)]), 60.0)
    yield opened
    opened.close(LIMIT_S)


class Slow:
    """A slow store that records its writes."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written: list[str] = []
        self.is_writing, self.go_on = threading.Event(), threading.Event()
        self._create = store.create
        monkeypatch.setattr(store, "create", self._slowly)

    def _slowly(self, owner: str, stream_id: str, *rest: Any) -> None:
        self.is_writing.set()
        assert self.go_on.wait(LIMIT_S)
        self._create(owner, stream_id, *rest)
        self.written.append(stream_id)


def test_the_newest_waiting_snapshot_is_written(
    text: Bundle, store: Store, writer: SnapshotWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.begin(text, lease("first"))
    writer.begin(text, lease("second"))
    slow = Slow(store, monkeypatch)
    writer.offer(text, lease("first"), 0, CHECKPOINT)
    assert slow.is_writing.wait(LIMIT_S)
    for content in (b"a", b"ab", b"abc"):
        writer.offer(text, lease("second"), 0, Checkpoint(array("B", content)))
    assert writer.flush(0.05) == 2
    slow.go_on.set()
    assert writer.flush(LIMIT_S) == 0
    assert slow.written == ["first", "second"]
    stored = writer.load("", "second")
    assert stored is not None
    assert stored.content.outputs[0].generated == b"abc"


def test_forget_also_deletes_a_snapshot_that_is_being_written(
    text: Bundle, store: Store, writer: SnapshotWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.begin(text, lease("s"))
    slow = Slow(store, monkeypatch)
    writer.offer(text, lease("s"), 0, CHECKPOINT)
    assert slow.is_writing.wait(LIMIT_S)
    forgetting = threading.Thread(target=writer.forget, args=("", "s"))
    forgetting.start()
    slow.go_on.set()
    forgetting.join(LIMIT_S)
    assert not forgetting.is_alive()
    assert slow.written == ["s", "s"]  # the snapshot, then the tombstone
    assert writer.load("", "s") is None


def test_forget_does_not_wait_for_other_streams(
    text: Bundle, store: Store, writer: SnapshotWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is always another snapshot to write."""
    create, busy = store.create, threading.Event()
    busy.set()

    def endless(owner: str, stream_id: str, *rest: Any) -> None:
        time.sleep(0.005)
        create(owner, stream_id, *rest)
        if busy.is_set():
            writer.offer(text, lease("other" + stream_id[-1:]), 0, CHECKPOINT)
            writer.offer(text, lease("another"), 0, CHECKPOINT)

    monkeypatch.setattr(store, "create", endless)
    writer.offer(text, lease("other"), 0, CHECKPOINT)
    forgetting = threading.Thread(target=writer.forget, args=("", "s"), daemon=True)
    forgetting.start()
    forgetting.join(5)
    left = forgetting.is_alive()
    busy.clear()
    assert not left


def test_a_snapshot_that_cannot_be_stored_stops_nothing(
    text: Bundle, store: Store, writer: SnapshotWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, failed = store.create, threading.Event()
    for stream_id in ("good", "bad"):
        writer.begin(text, lease(stream_id))

    def full(owner: str, stream_id: str, name: str, *rest: Any) -> None:
        if stream_id == "bad" and name != TOMBSTONE:
            failed.set()
            raise OSError("no space left on device")
        create(owner, stream_id, name, *rest)

    monkeypatch.setattr(store, "create", full)
    writer.offer(text, lease("bad"), 0, CHECKPOINT)
    assert failed.wait(LIMIT_S)
    writer.offer(text, lease("good"), 0, CHECKPOINT)
    until = time.monotonic() + LIMIT_S
    while not (snapshot := writer.load("", "good")) or not snapshot.content.outputs:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert writer.flush(0.1) == 1  # tried again and again
    writer.forget("", "bad")
    assert writer.flush(LIMIT_S) == 0
