"""The bucket of the chaos run fails as it is told."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import RemoteDisconnected

import pytest

from loadtest.scenarios.bucket import Bucket, Trouble

LIMIT_S = 30.0
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    pytest.importorskip("moto.server")
    opened = Bucket()
    with opened.running():
        yield opened


@pytest.fixture(autouse=True)
def works(bucket: Bucket) -> Iterator[None]:
    yield
    bucket.fail(Trouble.NONE)


def put(bucket: Bucket, name: str, limit_s: float = LIMIT_S, **headers: str) -> None:
    """Store an object of the stream `name`."""
    url = f"http://127.0.0.1:{bucket.port}/snapshots/folder/owner/{name}/object"
    headers["Authorization"] = "AWS4-HMAC-SHA256 Credential=none/20260101/us-east-1/s3/aws4_request"
    request = urllib.request.Request(url, b"content", headers, method="PUT")
    with OPENER.open(request, timeout=limit_s) as answer:
        assert answer.status == 200


def test_it_tells_which_streams_it_has(bucket: Bucket) -> None:
    before = bucket.streams()
    for number in range(3):
        put(bucket, f"has-{number}")
    assert bucket.streams() - before == {"has-0", "has-1", "has-2"}


def test_one_of_many_creates_an_object(bucket: Bucket) -> None:
    outcomes: list[int] = []

    def create() -> None:
        try:
            put(bucket, "created", **{"If-None-Match": "*"})
            outcomes.append(200)
        except urllib.error.HTTPError as error:
            error.close()
            outcomes.append(error.code)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert sorted(outcomes) == [200] + 7 * [412]


def test_what_is_refused_is_not_done(bucket: Bucket) -> None:
    bucket.fail(Trouble.REFUSES)
    with pytest.raises(urllib.error.HTTPError, match=r"50[03]") as caught:
        put(bucket, "refused")
    caught.value.close()
    assert "refused" not in bucket.streams()
    assert bucket.requests[Trouble.REFUSES] == bucket.moments[Trouble.REFUSES] == 1


@pytest.mark.parametrize(
    ("trouble", "is_done"), [(Trouble.CUTS, False), (Trouble.LOSES, True)], ids=str
)
def test_a_connection_breaks(bucket: Bucket, trouble: Trouble, is_done: bool) -> None:
    bucket.fail(trouble)
    with pytest.raises((RemoteDisconnected, ConnectionError, urllib.error.URLError)):
        put(bucket, f"broken-{trouble.name}")
    assert (f"broken-{trouble.name}" in bucket.streams()) == is_done


def test_what_hangs_is_done_late(bucket: Bucket) -> None:
    bucket.fail(Trouble.HANGS)
    with pytest.raises((TimeoutError, socket.timeout, urllib.error.URLError)):
        put(bucket, "hangs", 0.2)
    assert "hangs" not in bucket.streams()
    bucket.fail(Trouble.NONE)
    put(bucket, "later")
    late = threading.Event()
    for _ in range(1000):
        if "hangs" in bucket.streams():
            break
        late.wait(0.02)
    assert "hangs" in bucket.streams()


def test_a_part_of_the_requests_fails(bucket: Bucket) -> None:
    bucket.fail(Trouble.REFUSES, share=0.0)
    put(bucket, "spared")
    bucket.fail(Trouble.SLOWS, share=0.5)
    before = bucket.requests.copy()
    for number in range(10):
        put(bucket, f"half-{number}")
    assert 0 < bucket.requests[Trouble.SLOWS] - before[Trouble.SLOWS] < 10
