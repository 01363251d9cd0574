from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from server.config import ConfigError
from server.snapshots.store import Store


@pytest.fixture(params=["file", "memory", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A URI of each kind of store."""
    if request.param == "s3":
        yield request.getfixturevalue("bucket")
    else:
        yield f"{request.param}://{tmp_path}/{uuid4().hex}"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3 bucket that exists during these tests."""
    boto3 = pytest.importorskip("boto3")
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        boto3.client("s3").create_bucket(Bucket="snapshots")
        yield f"s3://snapshots/{uuid4().hex}"
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        server.stop()


def test_get_returns_what_put_stored(uri: str) -> None:
    store, again = Store(uri), Store(uri)
    owner = uuid4().hex
    assert store.get(owner, "stream") == {}
    store.put(owner, "stream", "origin", b"one")
    store.put(owner, "stream", "0", b"two")
    store.put(owner, "stream", "0", b"three" * 1000)
    store.put(owner, "other", "0", b"four")
    assert again.get(owner, "stream") == {"origin": b"one", "0": b"three" * 1000}
    assert again.streams(owner) == ["other", "stream"]
    assert again.streams("nobody") == []
    assert again.get("nobody", "stream") == {}
    again.delete(owner, "stream")
    again.delete(owner, "stream")
    assert store.get(owner, "stream") == {}
    assert store.streams(owner) == ["other"]


def test_old_streams_are_swept(uri: str) -> None:
    store, owner = Store(uri), uuid4().hex
    store.put(owner, "stream", "0", b"old")
    time.sleep(1.2)  # S3 counts in seconds
    store.put(owner, "stream", "1", b"new: the stream lives")
    store.put(owner, "other", "0", b"new")
    assert store.sweep(older_than_s=600) == 0
    assert len(store.get(owner, "stream")) == 2
    time.sleep(1.2)
    store.put(owner, "other", "0", b"newer")
    assert store.sweep(older_than_s=1.0) >= 1
    assert store.streams(owner) == ["other"]


def test_only_a_shared_store_is_durable(uri: str) -> None:
    assert Store(uri).is_shared == (not uri.startswith("memory"))


@pytest.mark.parametrize("uri", ["nonsense://x", "sftp2://host/x"])
def test_an_unknown_protocol_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=uri):
        Store(uri)


@pytest.mark.parametrize("name", ["", "..", "a/../../b", "a/b", "a\0b", "."])
def test_no_name_leads_out_of_the_store(name: str, tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/store")
    assert store.get("me", name) == {}
    store.delete("me", name)
    with pytest.raises(FileNotFoundError):
        store.put("me", name, "0", b"x")
    assert not list(tmp_path.rglob("0"))


def test_a_reader_never_gets_a_part(tmp_path: Path) -> None:
    store, size, stop = Store(f"file://{tmp_path}"), 1 << 20, threading.Event()
    store.put("me", "s", "0", bytes(size))

    def write() -> None:
        number = 0
        while not stop.is_set():
            number = (number + 1) % 256
            store.put("me", "s", "0", bytes([number]) * size)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(50):
            found = store.get("me", "s")
            assert len(set(found["0"])) == 1
            assert (len(found["0"]), list(found)) == (size, ["0"])
    finally:
        stop.set()
        writer.join()
