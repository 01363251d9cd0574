"""A bucket in a server on the loopback, which speaks as S3 does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest


@contextmanager
def bucket_server() -> Iterator[str]:
    """The URI of a bucket, and the environment in which our client finds it."""
    boto3 = pytest.importorskip("boto3")
    moto_server = pytest.importorskip("moto.server")
    responses = pytest.importorskip("moto.s3.responses")
    forget_clients()
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patched.setenv("AWS_ACCESS_KEY_ID", "none")
        patched.setenv("AWS_SECRET_ACCESS_KEY", "none")
        patched.setenv("AWS_DEFAULT_REGION", "us-east-1")
        _make_puts_atomic(patched, responses.S3Response)
        try:
            boto3.client("s3").create_bucket(Bucket="snapshots")
            yield "s3://snapshots"
        finally:
            server.stop()


def forget_clients() -> None:
    """What fsspec remembers of S3, which has the address of an earlier server."""
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()


def _make_puts_atomic(patched: pytest.MonkeyPatch, responses: Any) -> None:
    """Moto looks whether an object is there, then puts it; S3 does both at once."""
    put, lock = responses.put_object, threading.Lock()

    @wraps(put)
    def alone(*arguments: Any, **named: Any) -> Any:
        with lock:
            return put(*arguments, **named)

    patched.setattr(responses, "put_object", alone)
