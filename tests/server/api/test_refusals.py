"""Whoever is refused for now is told when to try again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from concertina.v1 import generation_service_pb2 as pb
from server.api.generation import stream
from server.auth.api_keys import ANYONE, Caller
from server.errors import EngineStopped, Overloaded, QuotaExceeded, RequestError, StorageFailed
from server.sessions.registry import Attachment
from tests.server.api.test_sessions import Context
from tests.server.engines import Gate
from tests.server.replicas import Replica
from tests.server.sessions.test_registry import Cluster, Received, cluster, read, request

__all__ = ["cluster"]  # a fixture

TWO = Caller("two", max_streams=2)
WAITS_S = (0.1, 30.0)


async def refused(replica: Replica, attaching: Awaitable[Attachment]) -> pb.Error:
    """The error event of a refused call; the status has the same code and message."""
    context = Context()
    events = [event async for event in stream(replica.registry, attaching, context)]
    assert [event.WhichOneof("event") for event in events] == ["error"]
    error: pb.Error = events[0].error
    assert context.code is not None
    assert (context.code.name, context.details) == (error.code, error.message)
    return error


@asynccontextmanager
async def running(replica: Replica, *callers: Caller) -> AsyncIterator[None]:
    """A stream of each, which does not end meanwhile."""
    with Gate(replica.model) as gate:
        open_ = [await replica.start(request(), caller) for caller in callers]
        yield
        gate.let(float("inf"))
        for attachment in open_:
            await read(attachment, Received(), 9)


async def test_by_a_quota(cluster: Cluster) -> None:
    replica = cluster()
    async with running(replica, TWO, TWO):
        for more, caller in ((1, TWO), (2, TWO)):
            wanted = request(output={"n": more})
            error = await refused(replica, replica.start(wanted, caller))
            assert (error.code, error.retryable) == ("RESOURCE_EXHAUSTED", True)
            # No stream has ended yet, so that each is taken to last a second.
            assert error.retry_after.ToMilliseconds() == 1000 * more


async def test_by_a_quota_of_streams_among_others(cluster: Cluster) -> None:
    """Those of the caller are two of four that end, one each second or so."""
    replica = cluster()
    async with running(replica, TWO, ANYONE, TWO, ANYONE):
        error = await refused(replica, replica.start(request(), TWO))
        assert error.retry_after.ToMilliseconds() == 2000


async def test_by_a_quota_that_is_taken_by_calls_just_now(cluster: Cluster) -> None:
    replica = cluster()
    with replica.registry.reserving(TWO, 2):
        error = await refused(replica, replica.start(request(), TWO))
    assert error.retry_after.ToMilliseconds() == 1000


async def test_by_a_full_queue(cluster: Cluster) -> None:
    replica = cluster(slots=1, queue_limit=0)
    async with running(replica, TWO):
        error = await refused(replica, replica.start(request()))
        assert (error.code, error.retryable) == ("RESOURCE_EXHAUSTED", True)
        assert error.retry_after.ToMilliseconds() == 1000


async def test_by_a_server_that_stops(cluster: Cluster) -> None:
    replica = cluster()
    replica.model.engine.stop_accepting()
    error = await refused(replica, replica.start(request()))
    assert (error.code, error.retryable) == ("UNAVAILABLE", True)
    assert error.retry_after.ToMilliseconds() == 100


async def test_by_a_store_that_is_away(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    first, got = cluster(), Received()
    await read(await first.start(request()), got, 9, 3)
    first.kill()
    for name in ("load", "begin"):
        replica = cluster()
        with monkeypatch.context() as failing:
            failing.setattr(replica.snapshots, name, _away)
            error = await refused(replica, replica.resume(got.stream_id, "", got.cursors(1)))
        assert (error.code, error.retryable) == ("UNAVAILABLE", True)
        assert error.retry_after.ToMilliseconds() == 1000


@pytest.mark.parametrize(
    "make",
    [
        EngineStopped,
        StorageFailed,
        lambda message: Overloaded(message, 2.0),
        lambda message: QuotaExceeded(message, 2.0),
    ],
)
async def test_by_whatever_is_over_soon(
    cluster: Cluster, make: Callable[[str], RequestError]
) -> None:
    async def fail() -> Attachment:
        raise make("planted")

    error = await refused(cluster(), fail())
    assert error.HasField("retry_after")
    assert WAITS_S[0] <= error.retry_after.ToNanoseconds() / 1e9 <= WAITS_S[1]


def _away(*_: object) -> None:
    raise OSError("no route to the store")
