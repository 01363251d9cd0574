from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from server.config import ConfigError
from server.snapshots.limited_calls import LimitedCalls
from server.snapshots.store import Store


def everything(store: Store, owner: str, stream_id: str) -> dict[str, bytes]:
    """All that is stored of a stream."""
    return store.get(owner, stream_id, store.names(owner, stream_id))


def streams(store: Store, owner: str) -> list[str]:
    """All streams of an owner."""
    return sorted(store.streams(owner, lambda names: True))


def test_get_returns_what_create_stored(uri: str) -> None:
    store, again = Store(uri), Store(uri)
    owner = uuid4().hex
    assert everything(store, owner, "stream") == {}
    many = {f"{number}": b"%d" % number * 1000 for number in range(10)}
    for name, content in many.items():
        store.create(owner, "stream", name, content)
    store.create(owner, "other", "0", b"four")
    assert everything(again, owner, "stream") == many
    assert again.get(owner, "stream", ["3", "never", "5"]) == {"3": many["3"], "5": many["5"]}
    assert streams(again, owner) == ["other", "stream"]
    assert again.streams(owner, lambda names: names == {*many}) == ["stream"]
    assert streams(again, "nobody") == []
    assert everything(again, "nobody", "stream") == {}
    again.delete(owner, "stream")
    again.delete(owner, "stream")
    assert everything(store, owner, "stream") == {}
    assert streams(store, owner) == ["other"]


def test_old_streams_are_swept(uri: str) -> None:
    store, owner = Store(uri), uuid4().hex
    old_s = 1.0 if uri.startswith("s3:") else 0.4  # S3 counts in seconds
    store.create(owner, "stream", "0", b"old")
    time.sleep(1.2 * old_s)
    store.create(owner, "stream", "1", b"new: the stream lives")
    store.create(owner, "other", "0", b"new")
    assert store.sweep(older_than_s=600) == 0
    assert len(everything(store, owner, "stream")) == 2
    time.sleep(1.2)
    store.create(owner, "other", "1", b"newer")
    assert store.sweep(older_than_s=1.0) >= 1
    assert streams(store, owner) == ["other"]


def test_what_has_a_kept_name_stays_longer(uri: str) -> None:
    store, owner = Store(uri), uuid4().hex
    for stream_id, names in (("one", ["0"]), ("two", ["0", "deleted"]), ("three", ["deleted"])):
        for name in names:
            store.create(owner, stream_id, name, uuid4().bytes)
    time.sleep(1.2)
    store.sweep(1.0, {"deleted": 60.0, "other": 0.0})
    assert streams(store, owner) == ["three", "two"]
    time.sleep(1.2)
    store.sweep(1.0, {"deleted": 1.2})
    assert streams(store, owner) == []


def test_what_was_written_during_a_sweep_stays(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream looked old when its folder was listed."""
    store, owner = Store(uri), uuid4().hex
    for name in ("one", "two"):
        store.create(owner, name, "0", b"old")
    time.sleep(1.2)
    find = store.backend.find

    def late(folder: str) -> Any:
        found = list(find(folder))
        monkeypatch.setattr(store.backend, "find", find)
        store.create(owner, "two", "1", b"new")
        return iter(found)

    monkeypatch.setattr(store.backend, "find", late)
    store.sweep(older_than_s=1.0)
    assert streams(store, owner) == ["two"]


def test_only_a_shared_store_is_durable(uri: str) -> None:
    assert Store(uri).is_shared == (not uri.startswith("memory"))


def test_of_all_who_create_one_succeeds(uri: str) -> None:
    store, owner = Store(uri), uuid4().hex
    for attempt in range(5):
        contents = [bytes([65 + number]) * 10_000 for number in range(6)]
        begin = threading.Barrier(len(contents))
        create = partial(_created, uri, owner, f"{attempt}", begin)
        with ThreadPoolExecutor(len(contents)) as pool:
            won = [content for content in pool.map(create, contents) if content]
        assert len(won) == 1
        assert everything(store, owner, "stream")[f"{attempt}"] == won[0]
    assert len(store.names(owner, "stream")) == 5


def _created(
    uri: str, owner: str, name: str, begin: threading.Barrier, content: bytes
) -> bytes | None:
    """The content, if it was created."""
    store = Store(uri)
    begin.wait()
    try:
        store.create(owner, "stream", name, content)
    except FileExistsError:
        return None
    return content


def test_a_free_name_is_one_that_was_dropped(uri: str) -> None:
    store, owner = Store(uri), uuid4().hex
    store.create(owner, "stream", "a", b"one")
    store.create(owner, "stream", "b", b"two")
    for name in ("a", "b"):
        with pytest.raises(FileExistsError):
            store.create(owner, "stream", name, b"three")
    store.remove(owner, "stream", ["a", "never"])
    store.create(owner, "stream", "a", b"four")
    assert everything(store, owner, "stream") == {"a": b"four", "b": b"two"}
    store.delete(owner, "stream", keep="b")
    store.delete(owner, "other", keep="b")
    assert everything(store, owner, "stream") == {"b": b"two"}


def test_a_store_can_be_tried(uri: str) -> None:
    store = Store(uri)
    store.probe()
    assert streams(store, "") == []


def test_one_of_all_sweeps(uri: str) -> None:
    stores = [Store(uri) for _ in range(3)]
    assert [store.begin_sweep(7) for store in stores] == [True, False, False]
    assert stores[1].begin_sweep(8)
    stores[0].create("me", "s", "0", b"x")
    stores[0].sweep(600)
    assert not stores[0].begin_sweep(8)
    time.sleep(1.2)
    assert stores[0].sweep(1.0) >= 1  # what says who sweeps goes too, and is no stream
    assert stores[0].begin_sweep(8)


def test_a_store_that_creates_twice_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"file://{tmp_path}")

    def create(path: str, content: bytes) -> None:
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(content)

    monkeypatch.setattr(store.backend, "create", create)
    with pytest.raises(OSError, match="there already"):
        store.probe()


@pytest.mark.parametrize("uri", ["http://host/x", "zip:///tmp/x.zip", "simplecache::memory://x"])
def test_what_cannot_create_exclusively_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"file://.* s3:// and memory://"):
        Store(uri)


def test_an_answer_that_got_lost_is_no_defeat(bucket: str) -> None:
    """S3's client sends a request again when it hears nothing."""
    store, owner = Store(bucket), uuid4().hex
    store.create(owner, "stream", "a", b"mine")
    store.create(owner, "stream", "a", b"mine")
    with pytest.raises(FileExistsError):
        store.create(owner, "stream", "a", b"others")


def test_files_that_could_not_be_written_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"file://{tmp_path}")
    store.create("me", "s", "0", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        store.create("me", "s", "1", b"new")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["0"]
    assert everything(store, "me", "s") == {"0": b"old"}


class Hanging:
    """A back end of which some operations hang until it is told to go on."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.go_on, self.left = threading.Event(), 0
        monkeypatch.setattr(Store, "time_limit_s", 0.1)
        for name in names:
            monkeypatch.setattr(store.backend, name, self._hang(getattr(store.backend, name)))

    def _hang(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def hanging(*arguments: Any) -> Any:
            self.left += 1
            try:
                assert self.go_on.wait(30)
                return real(*arguments)
            finally:
                self.left -= 1

        return hanging


def test_nobody_waits_for_a_store_that_hangs(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, owner = Store(uri), uuid4().hex
    store.create(owner, "s", "0", b"x")
    names = ("create", "read", "names", "find", "remove", "clear")
    hanging = Hanging(store, monkeypatch, *names)
    operations: list[Callable[[], Any]] = [
        lambda: store.create(owner, "s", uuid4().hex, b"y"),
        lambda: store.create(owner, "s", uuid4().hex, b"y"),
        lambda: store.get(owner, "s", ["0"]),
        lambda: store.names(owner, "s"),
        lambda: streams(store, owner),
        lambda: store.remove(owner, "s", ["0"]),
        lambda: store.delete(owner, "s"),
        store.probe,
    ]
    for operation in operations:
        with pytest.raises(TimeoutError, match=r"0\.1"):
            operation()
    began = time.monotonic()
    for operation in operations:  # as many hang as may
        with pytest.raises(TimeoutError, match="8 calls hang"):
            operation()
    assert time.monotonic() - began < 0.1
    hanging.go_on.set()
    while hanging.left:
        time.sleep(0.01)
    monkeypatch.setattr(Store, "time_limit_s", 10.0)
    store.probe()


def test_what_was_given_up_is_not_created_after_all(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, owner = Store(uri), uuid4().hex
    hanging = Hanging(store, monkeypatch, "create")
    with pytest.raises(TimeoutError):
        store.create(owner, "s", "1", b"y")
    monkeypatch.setattr(Store, "time_limit_s", 10.0)
    with pytest.raises(OSError, match="has not ended"):
        store.create(owner, "s", "1", b"z")
    hanging.go_on.set()
    until = time.monotonic() + 10
    while hanging.left or store.names(owner, "s"):
        assert time.monotonic() < until
        time.sleep(0.01)
    while True:
        try:
            store.create(owner, "s", "1", b"z")
            break
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert store.get(owner, "s", ["1"]) == {"1": b"z"}


def test_what_could_not_be_taken_back_is_before_the_next_create(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every later try said that the earlier one had not ended."""
    store, owner, failed = Store(uri), uuid4().hex, threading.Event()
    remove = store.backend.remove

    def fail(path: str) -> None:
        failed.set()
        raise OSError(errno.EIO, "the store is away")

    monkeypatch.setattr(store.backend, "remove", fail)
    hanging = Hanging(store, monkeypatch, "create")
    with pytest.raises(TimeoutError):
        store.create(owner, "s", "1", b"y")
    hanging.go_on.set()
    assert failed.wait(10)
    monkeypatch.setattr(Store, "time_limit_s", 10.0)
    monkeypatch.setattr(store.backend, "remove", remove)
    until = time.monotonic() + 10
    while True:
        try:
            store.create(owner, "s", "1", b"z")
            break
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert store.get(owner, "s", ["1"]) == {"1": b"z"}


@pytest.mark.parametrize("after", ["remove", "delete"])
def test_what_hung_while_it_was_dropped_does_not_come_back(
    after: str, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, owner = Store(uri), uuid4().hex
    hanging = Hanging(store, monkeypatch, "create")
    with pytest.raises(TimeoutError):
        store.create(owner, "s", "0", b"older")
    monkeypatch.setattr(Store, "time_limit_s", 10.0)
    if after == "remove":
        store.remove(owner, "s", ["0"])
    else:
        store.delete(owner, "s", keep="tombstone")
    hanging.go_on.set()
    until = time.monotonic() + 10
    while hanging.left or everything(store, owner, "s"):
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("stays", [True, False])
def test_what_lands_late_stays_where_it_is_wanted(
    stays: bool, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, owner, asked = Store(uri), uuid4().hex, []
    store.create(owner, "s", "origin", b"x")
    hanging = Hanging(store, monkeypatch, "create")

    def wanted(names: set[str]) -> bool:
        asked.append(names)
        return stays

    with pytest.raises(TimeoutError):
        store.create(owner, "s", "0", b"late", wanted)
    assert asked == []
    monkeypatch.setattr(Store, "time_limit_s", 10.0)
    hanging.go_on.set()
    until = time.monotonic() + 10
    left = {"origin", "0"} if stays else {"origin"}
    while not asked or store.names(owner, "s") != left:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert asked == [{"origin", "0"}]


def test_those_who_come_many_wait_for_their_turn() -> None:
    calls = LimitedCalls(2)
    with ThreadPoolExecutor(16) as pool:
        for _ in range(16):
            pool.submit(calls.call, 10.0, lambda: time.sleep(0.02)).add_done_callback(
                lambda done: done.result()
            )
    with pytest.raises(ZeroDivisionError):
        calls.call(1.0, lambda: 1 / 0)
    assert calls.call(1.0, lambda: 3) == 3


def test_what_is_no_oserror_becomes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 without credentials, say."""
    store = Store(f"file://{tmp_path}")

    def anonymous(*_: Any) -> None:
        raise RuntimeError("no credentials")

    monkeypatch.setattr(store.backend, "create", anonymous)
    with pytest.raises(OSError, match="RuntimeError: no credentials"):
        store.create("me", "s", "0", b"x")


@pytest.mark.parametrize("uri", ["nonsense://x", "sftp2://host/x"])
def test_an_unknown_protocol_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=uri):
        Store(uri)


@pytest.mark.parametrize("name", ["", "..", "a/../../b", "a/b", "a\0b", "."])
def test_no_name_leads_out_of_the_store(name: str, tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/store")
    assert store.names("me", name) == set()
    store.delete("me", name)
    with pytest.raises(FileNotFoundError):
        store.create("me", name, "0", b"x")
    assert not list(tmp_path.rglob("0"))


def test_a_reader_never_gets_a_part(tmp_path: Path) -> None:
    store, owner, size = Store(f"file://{tmp_path}"), uuid4().hex, 1 << 20
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number = (number + 1) % 256
            store.create(owner, "s", "0", bytes([number]) * size)
            store.remove(owner, "s", ["0"])

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    until = time.monotonic() + 20
    try:
        while seen < 20 and time.monotonic() < until:
            for content in everything(store, owner, "s").values():
                assert (len(content), len(set(content))) == (size, 1)
                seen += 1
    finally:
        stop.set()
        writer.join()
    assert seen == 20
