"""The store is away, hangs, is full, or fails now and then."""

from __future__ import annotations

import base64
import errno
import logging
import random
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from server.bundles.bundle import Bundle
from server.checkpoint import Checkpoint
from server.config import ConfigError
from server.request import Lease, Request, prompt_of
from server.snapshots.availability import Availability
from server.snapshots.names import TOMBSTONE, origin_name
from server.snapshots.opening import open_store, open_writer
from server.snapshots.sealer import KEY_VARIABLE, Sealer
from server.snapshots.store import Store
from server.snapshots.sweeper import Sweeper
from server.snapshots.waiting import Job, Waiting
from server.snapshots.writer import SnapshotWriter
from tests.server.snapshots.buckets import forget_clients
from tests.server.snapshots.test_store import Hanging

LIMIT_S = 30.0
AWAY = "the snapshot store is away"
STREAM = Lease("s", (Request(prompt_of(256, [], "B"), max_tokens=50),), "me", keep_s=60.0)


def at(text: str) -> Checkpoint:
    """How far an output is that has generated `text`."""
    return Checkpoint(array("B", text.encode()))


def until(condition: Callable[[], object]) -> None:
    """Wait for something that happens soon."""
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def metric(name: str) -> float:
    value = REGISTRY.get_sample_value(name)
    assert value is not None
    return value


def failures() -> float:
    return metric("concertina_snapshot_failures_total")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/store")


@pytest.fixture
def writer(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[SnapshotWriter]:
    """One that tries again soon."""
    monkeypatch.setattr(Availability, "shortest_pause_s", 0.01)
    monkeypatch.setattr(Availability, "longest_pause_s", 0.1)
    opened = SnapshotWriter(store, Sealer([bytes(32)]), 60.0)
    yield opened
    opened.close(LIMIT_S)


def generated(writer: SnapshotWriter, stream_id: str = "s") -> str:
    """What is stored of the first output of a stream."""
    snapshot = writer.load("me", stream_id)
    assert snapshot is not None
    outputs = snapshot.content.outputs
    return outputs[0].generated.decode() if outputs else ""


class Failing:
    """A back end of which some operations fail while `share` of them is above 0."""

    def __init__(self, store: Store, patched: pytest.MonkeyPatch, *names: str) -> None:
        self.share, self.random, self.failed = 1.0, random.Random(1), 0
        for name in names:
            patched.setattr(store.backend, name, self._failing(getattr(store.backend, name)))

    def _failing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def failing(path: str, *arguments: Any) -> Any:
            if ".probes" not in path and self.random.random() < self.share:
                self.failed += 1
                raise OSError(errno.ENOSPC, "no space left on device")
            return real(path, *arguments)

        return failing


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the environment, and little patience."""
    monkeypatch.setenv(KEY_VARIABLE, base64.b64encode(bytes(32)).decode())
    monkeypatch.setattr(Store, "time_limit_s", 2.0)


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize("uri", ["file:///proc/nope", "s3://nobody/here"])
def test_a_store_that_cannot_be_used_ends_the_start(
    uri: str, text: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forget_clients()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    for opened in (open_store, lambda uri: open_writer(uri, 60.0)):
        with pytest.raises(ConfigError, match=rf"{uri}.*Error: .*--snapshots-optional"):
            opened(uri)
    assert open_store(uri, optional=True) is not None
    writer = open_writer(uri, 60.0, optional=True)
    assert writer is not None
    assert not writer.is_up
    assert metric("concertina_store_up") == 0
    assert [record.message for record in caplog.records if AWAY in record.message] != []
    with pytest.raises(OSError, match="away"):
        writer.begin(text, STREAM)
    writer.offer(text, STREAM, 0, at("abc"))
    began = time.monotonic()
    writer.close(LIMIT_S)
    assert time.monotonic() - began < 1


@pytest.mark.usefixtures("key")
def test_a_store_that_hangs_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr("server.snapshots.backends.Files.create", lambda *_: go_on.wait(LIMIT_S))
    monkeypatch.setattr(Store, "time_limit_s", 0.1)
    with pytest.raises(ConfigError, match=r"TimeoutError: no answer within 0\.1"):
        open_writer(f"file://{tmp_path}", 60.0)
    go_on.set()


@pytest.mark.usefixtures("key")
def test_a_store_that_works_is_opened(tmp_path: Path) -> None:
    for optional in (False, True):
        writer = open_writer(f"file://{tmp_path}", 60.0, optional)
        assert writer is not None
        assert writer.is_up
        assert metric("concertina_store_up") == 1
        writer.close(LIMIT_S)
    assert open_writer("", 60.0) is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.usefixtures("key")
def test_what_waits_fits_into_a_small_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr("concertina.machine.memory_bytes", lambda _: 2**29)
    monkeypatch.setattr(
        "server.snapshots.writer.Waiting", lambda most: made.append(most) or Waiting(most)
    )
    for replicas in (1, 2):
        writer = open_writer(f"file://{tmp_path}", 60.0, replicas=replicas)
        assert writer is not None
        writer.close(LIMIT_S)
    assert made == [2**26, 2**25]


def test_nobody_waits_for_a_store_that_hangs(
    text: Bundle, store: Store, writer: SnapshotWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B9."""
    writer.begin(text, STREAM)
    hanging = Hanging(store, monkeypatch, "create")
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        writer.begin(text, replace(STREAM, stream_id="new"))
    assert not writer.is_up
    assert metric("concertina_store_up") == 0
    for _ in range(20):
        with pytest.raises(OSError, match="away"):
            writer.begin(text, replace(STREAM, stream_id="new"))
    for content in ("a", "ab", "abc"):
        writer.offer(text, STREAM, 0, at(content))
    assert writer.flush(0.3) == 1
    assert time.monotonic() - began < 2
    assert generated(writer) == ""
    hanging.go_on.set()
    assert writer.flush(LIMIT_S) == 0
    assert generated(writer) == "abc"
    until(lambda: writer.is_up)
    assert metric("concertina_store_up") == 1
    writer.begin(text, replace(STREAM, stream_id="new"))


def test_a_snapshot_that_hangs_is_written_later(
    text: Bundle, store: Store, writer: SnapshotWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.begin(text, STREAM)
    hanging, before = Hanging(store, monkeypatch, "create"), failures()
    writer.offer(text, STREAM, 0, at("abc"))
    until(lambda: failures() > before)
    writer.offer(text, STREAM, 0, at("abcd"))
    hanging.go_on.set()
    monkeypatch.setattr(Store, "time_limit_s", 10.0)
    assert writer.flush(LIMIT_S) == 0
    until(lambda: not hanging.left)
    until(lambda: generated(writer) == "abcd")  # whichever write ended last


def test_a_store_that_works_again_is_tried_at_once(
    text: Bundle, store: Store, writer: SnapshotWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next trial may be half a minute away; somebody reads meanwhile, and it works."""
    monkeypatch.setattr(Availability, "shortest_pause_s", LIMIT_S)
    monkeypatch.setattr(Availability, "longest_pause_s", LIMIT_S)
    create, tried = store.backend.create, []

    def full(path: str, content: bytes) -> None:
        tried.append(path)
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store.backend, "create", full)
        with pytest.raises(OSError, match="no space"):
            writer.begin(text, STREAM)
        until(lambda: any(".probes" in path for path in tried))
        time.sleep(0.05)
    assert store.backend.create == create
    time.sleep(0.05)
    assert not writer.is_up
    assert writer.load("me", "s") is None
    until(lambda: writer.is_up)
    writer.begin(text, STREAM)


def test_a_full_store_is_told_once_and_caught_up_with(
    text: Bundle,
    store: Store,
    writer: SnapshotWriter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Small objects still fit, so that trying the store works."""
    streams = [replace(STREAM, stream_id=f"s{number}") for number in range(5)]
    for stream in streams:
        writer.begin(text, stream)
    full, before = Failing(store, monkeypatch, "create"), failures()
    for stream in streams:
        writer.offer(text, stream, 0, at("abc"))
    until(lambda: full.failed >= 8)
    assert writer.flush(0.05) == 5
    assert failures() - before >= 7
    assert sum(AWAY in record.message for record in caplog.records) == 1
    full.share = 0.0
    assert writer.flush(LIMIT_S) == 0
    assert [generated(writer, stream.stream_id) for stream in streams] == ["abc"] * 5
    assert sum("store is back" in record.message for record in caplog.records) == 1


def test_a_store_that_fails_now_and_then_loses_nothing(
    text: Bundle, store: Store, writer: SnapshotWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(store, monkeypatch, "create", "read", "names", "remove")
    failing.share = 0.3
    streams, begun = [replace(STREAM, stream_id=f"s{number}") for number in range(8)], []
    for stream in streams:
        for _ in range(50):
            try:
                writer.begin(text, stream)
            except OSError:
                until(lambda: writer.is_up)
            else:
                begun.append(stream)
                break
    assert begun == streams  # who failed to begin has left nothing
    for length in range(1, 20):
        for stream in streams:
            writer.offer(text, stream, 0, at("x" * length))
        time.sleep(0.01)
    assert writer.flush(LIMIT_S) == 0
    assert failing.failed > 10
    failing.share = 0.0
    assert {generated(writer, stream.stream_id) for stream in streams} == {"x" * 19}


def test_a_claim_that_cannot_be_checked_is_made_again(
    text: Bundle, store: Store, writer: SnapshotWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor can it be taken back at once."""
    failing = Failing(store, monkeypatch, "names", "remove")
    with pytest.raises(OSError, match="no space"):
        writer.begin(text, STREAM)
    failing.share = 0.0
    until(lambda: writer.is_up)
    writer.begin(text, STREAM)
    assert generated(writer) == ""


def test_a_stream_that_began_in_an_outage_is_claimed_later(
    text: Bundle, store: Store, writer: SnapshotWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Lease] = []
    lost: list[Lease] = []
    writer.on_stored = lambda lease, stored: begun.append(lease)
    writer.on_lost = lambda lease, deleted: lost.append(lease)
    failing = Failing(store, monkeypatch, "create")
    with pytest.raises(OSError, match="no space"):
        writer.begin(text, STREAM)
    writer.begin_later(text, STREAM)
    writer.offer(text, STREAM, 0, at("abc"))
    time.sleep(0.1)
    assert (begun, writer.load("me", "s")) == ([], None)
    failing.share = 0.0
    for story in ("abc", "abcd"):  # the second finds it claimed, and not to be claimed any more
        writer.offer(text, STREAM, 0, at(story))
        assert writer.flush(LIMIT_S) == 0
        assert (begun, lost, generated(writer)) == ([STREAM], [], story)


def test_a_stream_that_began_in_an_outage_is_claimed_without_a_snapshot(
    text: Bundle, store: Store, writer: SnapshotWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as the store is back, and not if it was not opened, or is deleted meanwhile."""
    told: list[tuple[str, bool]] = []
    writer.on_stored = lambda lease, stored: told.append((lease.stream_id, stored))
    failing = Failing(store, monkeypatch, "create")
    with pytest.raises(OSError, match="no space"):
        writer.begin(text, STREAM)
    for stream_id in ("s", "unopened", "deleted"):
        writer.begin_later(text, replace(STREAM, stream_id=stream_id))
    writer.begin_never(replace(STREAM, stream_id="unopened"))
    writer.forget("me", "deleted")
    failing.share = 0.0
    until(lambda: told)
    time.sleep(0.05)
    assert told == [("s", True)]
    assert writer.streams("me") == ["s"]
    assert generated(writer) == ""


def test_a_stream_that_began_in_an_outage_yields_to_another_of_its_name(
    text: Bundle,
    store: Store,
    writer: SnapshotWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost: list[tuple[Lease, bool]] = []
    writer.on_lost = lambda lease, deleted: lost.append((lease, deleted))
    failing = Failing(store, monkeypatch, "create")
    with pytest.raises(OSError, match="no space"):
        writer.begin(text, STREAM)
    writer.begin_later(text, STREAM)
    other = SnapshotWriter(Store(f"file://{tmp_path}/store"), Sealer([bytes(32)]), 60.0)
    other.begin(text, STREAM)
    other.offer(text, STREAM, 0, at("other"))
    other.close(LIMIT_S)
    writer.offer(text, STREAM, 0, at("mine"))
    failing.share = 0.0
    assert writer.flush(LIMIT_S) == 0
    assert (lost, generated(writer)) == ([(STREAM, False)], "other")


def test_a_stream_that_began_in_an_outage_is_continued_before_its_claim(
    text: Bundle, store: Store, writer: SnapshotWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[tuple[Lease, bool]] = []
    writer.on_lost = lambda lease, deleted: lost.append((lease, deleted))
    failing = Failing(store, monkeypatch, "create")
    with pytest.raises(OSError, match="no space"):
        writer.begin(text, STREAM)
    writer.begin_later(text, STREAM)
    failing.share = 0.0
    until(lambda: writer.is_up)
    continued = replace(STREAM, epoch=2)
    writer.begin(text, continued, [at("ab")])
    writer.offer(text, continued, 0, at("abcd"))
    assert writer.flush(LIMIT_S) == 0
    assert generated(writer) == "abcd"
    assert lost in ([], [(STREAM, False)])  # whoever holds the later lease has lost nothing


@pytest.mark.parametrize("claimed", [False, True])
def test_what_fails_while_its_stream_is_deleted_is_not_written_later(
    claimed: bool,
    text: Bundle,
    store: Store,
    writer: SnapshotWriter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, deleting, real = threading.Event(), threading.Event(), store.backend.create
    told: list[Lease] = []
    writer.on_stored = writer.on_lost = lambda lease, _: told.append(lease)

    def create(path: str, *rest: Any) -> None:
        if TOMBSTONE in path or ".probes" in path:
            return real(path, *rest)
        begun.set()
        assert deleting.wait(LIMIT_S)
        raise OSError(errno.ENOSPC, "no space left on device")

    def withdraw(waiting: Waiting, *arguments: Any) -> None:
        withdraw_now(waiting, *arguments)
        deleting.set()  # whoever deletes holds the lock until it waits for the writer

    if claimed:
        writer.begin(text, STREAM)
    monkeypatch.setattr(store.backend, "create", create)
    withdraw_now = Waiting.withdraw
    monkeypatch.setattr(Waiting, "withdraw", withdraw)
    if not claimed:
        writer.begin_later(text, STREAM)
    writer.offer(text, STREAM, 0, at("abc"))
    assert begun.wait(LIMIT_S)
    writer.forget("me", "s")
    monkeypatch.setattr(store.backend, "create", real)
    until(lambda: writer.is_up)
    assert writer.flush(LIMIT_S) == 0
    assert store.names("me", "s") == ({TOMBSTONE} if claimed else set())
    assert told == []


@pytest.mark.parametrize("operations", [["names"], ["names", "remove"]])
def test_a_claim_that_cannot_be_checked_is_taken_back(
    operations: list[str],
    text: Bundle,
    store: Store,
    writer: SnapshotWriter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writer.begin(text, STREAM)
    writer.offer(text, STREAM, 0, at("abc"))
    assert writer.flush(LIMIT_S) == 0
    names = store.names("me", "s")
    failing = Failing(store, monkeypatch, *operations)
    with pytest.raises(OSError, match="no space"):
        writer.begin(text, replace(STREAM, epoch=2), [at("ab")])
    time.sleep(0.05)  # the store is tried, and seems to work
    failing.share = 0.0
    until(lambda: store.names("me", "s") == names)
    until(lambda: writer.is_up)
    assert origin_name(2) not in names
    assert generated(writer) == "abc"
    writer.begin(text, replace(STREAM, epoch=2), [at("ab")])
    assert generated(writer) == "ab"


def test_a_delete_that_fails_half_way_has_deleted(
    text: Bundle, store: Store, writer: SnapshotWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.begin(text, STREAM)
    failing = Failing(store, monkeypatch, "clear")
    with pytest.raises(OSError, match="no space"):
        writer.forget("me", "s")
    assert writer.load("me", "s") is None
    failing.share = 0.0
    writer.forget("me", "s")
    assert len(store.names("me", "s")) == 1


def test_one_that_cannot_be_sealed_is_dropped(
    text: Bundle, writer: SnapshotWriter, caplog: pytest.LogCaptureFixture
) -> None:
    before = failures()
    writer.begin(text, STREAM)
    writer.offer(text, STREAM, -1, at("abc"))
    assert writer.flush(LIMIT_S) == 0
    assert failures() == before + 1
    assert writer.is_up
    assert "could not be stored" in caplog.text


def test_whoever_is_told_of_a_loss_does_not_end_the_thread(
    text: Bundle, writer: SnapshotWriter
) -> None:
    def fail(lease: Lease, deleted: bool) -> None:
        raise RuntimeError("planted")

    writer.on_lost = fail
    writer.begin(text, STREAM)
    writer.forget("me", "s")
    writer.offer(text, STREAM, 0, at("abc"))
    assert writer.flush(LIMIT_S) == 0
    other = replace(STREAM, stream_id="other")
    writer.begin(text, other)
    writer.offer(text, other, 0, at("abc"))
    assert writer.flush(LIMIT_S) == 0
    assert generated(writer, "other") == "abc"


def test_pauses_grow_until_something_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Availability, "shortest_pause_s", 0.02)
    monkeypatch.setattr(Availability, "longest_pause_s", 0.1)
    tried: list[float] = []
    is_away = threading.Event()
    is_away.set()

    def probe() -> None:
        tried.append(time.monotonic())
        if is_away.is_set():
            raise OSError

    back = threading.Event()
    availability = Availability(probe, back.set)
    availability.failed(OSError())
    until(lambda: len(tried) >= 6)
    pauses = [later - earlier for earlier, later in pairwise(tried)]
    for pause, least in zip(pauses, [0.02, 0.04, 0.08, 0.1], strict=False):
        assert pause >= least
    is_away.clear()
    assert back.wait(LIMIT_S)
    assert availability.is_up
    availability.close()


def test_one_server_sweeps_and_holds_up_no_writes(
    text: Bundle, store: Store, writer: SnapshotWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B10."""
    swept, go_on = [], threading.Event()

    def sweep(older_than_s: float, kept_s: dict[str, float]) -> int:
        assert kept_s == {TOMBSTONE: 24 * 3600}
        swept.append(older_than_s)
        assert go_on.wait(LIMIT_S)
        return 0

    monkeypatch.setattr(store, "sweep", sweep)
    sweepers = [Sweeper(store, 77.0, period_s=0.3) for _ in range(3)]
    until(lambda: swept)
    time.sleep(0.05)
    assert swept == [77.0]  # each of three was asked
    writer.begin(text, STREAM)
    writer.offer(text, STREAM, 0, at("abc"))
    assert writer.flush(5) == 0
    go_on.set()
    until(lambda: len(swept) >= 3)
    for sweeper in sweepers:
        sweeper.close()


def test_a_sweep_that_fails_is_tried_in_the_next_period(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[float] = []

    def sweep(older_than_s: float, kept_s: dict[str, float]) -> int:
        assert kept_s == {TOMBSTONE: 24 * 3600}
        tried.append(older_than_s)
        raise OSError("planted")

    monkeypatch.setattr(store, "sweep", sweep)
    sweeper = Sweeper(store, 60.0, period_s=0.05)
    until(lambda: len(tried) >= 3)
    sweeper.close()
    told = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1


def job(
    text: Bundle, owner: str, stream_id: str, size: int, output: int = 0, epoch: int = 1
) -> Job:
    stream = replace(STREAM, owner=owner, stream_id=stream_id, epoch=epoch)
    return Job(text, stream, output, at("x" * size))


def names(waiting: Waiting) -> list[tuple[str, str, int]]:
    popped = []
    while len(waiting):
        found = waiting.pop()
        popped.append((*found.stream, found.output))
    return popped


def test_owners_take_turns_and_so_do_their_streams(text: Bundle) -> None:
    waiting = Waiting(10**9)
    for stream_id in ("a", "b", "c"):
        for output in (0, 1):
            assert waiting.add(job(text, "many", stream_id, 1, output)) == 0
    waiting.add(job(text, "few", "d", 1))
    assert names(waiting) == [
        ("many", "a", 0),
        ("few", "d", 0),
        ("many", "b", 0),
        ("many", "c", 0),
        ("many", "a", 1),
        ("many", "b", 1),
        ("many", "c", 1),
    ]


def test_who_has_most_waiting_pays_for_too_much(text: Bundle) -> None:
    size = job(text, "me", "s", 10).nbytes
    waiting = Waiting(10 * size)
    assert waiting.add(job(text, "few", "a", 10)) == 0
    dropped = sum(waiting.add(job(text, "many", f"s{number}", 10)) for number in range(20))
    assert dropped == 11
    assert len(waiting) == 10
    left = names(waiting)
    assert ("few", "a", 0) in left
    assert ("many", "s19", 0) in left
    assert waiting.add(job(text, "one", "large", 1000)) == 0  # alone it waits, however large


def test_an_older_one_takes_no_newer_ones_place(text: Bundle) -> None:
    waiting = Waiting(10**9)
    newer = job(text, "me", "s", 5, epoch=2)
    waiting.add(newer)
    waiting.add(job(text, "me", "s", 9, epoch=1))
    waiting.add_again(job(text, "me", "s", 3, epoch=2))
    waiting.withdraw("me", "s", below=2)
    waiting.withdraw("me", "other")
    assert len(waiting) == 1
    assert waiting.pop() == newer
    waiting.add_again(newer)
    waiting.withdraw("me", "s")
    assert len(waiting) == 0
