"""A reader that stops reading costs a parked stream: no slot, no memory, and nobody else's time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

import grpc
import pytest

from concertina.client import Client, Finished
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import generation_service_pb2_grpc
from tests.e2e.conftest import CONTEXT, SLOTS
from tests.e2e.servers import Server, until

TEXT = "long-text"
CONNECTIONS, STREAMS = SLOTS, 2
STALL_SECONDS = 120.0
SOON = 20.0
MEBIBYTE = 1024 * 1024

# Little fits between server and reader, so that a stall is felt after thousands of tokens.
SMALL_WINDOW = (
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 16 * 1024),
    ("grpc.use_local_subchannel_pool", 1),
)


@pytest.fixture
def stalled(server: Server) -> Iterator[list[Iterator[pb.GenerateResponse]]]:
    """Streams of several connections that were begun and are not read on."""
    request = pb.GenerateRequest(
        model=TEXT, stopping=pb.StoppingCriteria(max_tokens=CONTEXT, ignore_eos=True)
    )
    calls = []
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            channel = stack.enter_context(grpc.insecure_channel(server.address, SMALL_WINDOW))
            stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
            calls += [stub.Generate(request, timeout=600) for _ in range(STREAMS)]
        for call in calls:
            next(call)
        yield calls


def settled(server: Server, streams: int) -> bool:
    """Whether all are paused for good: what lies between server and reader has filled up, too."""
    before = server.metric("concertina_generation_tokens_total")
    time.sleep(3)
    return (
        server.metric("concertina_streams_paused") == streams
        and server.metric("concertina_generation_tokens_total") == before
    )


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_stalled_readers(server: Server, stalled: list[Iterator[pb.GenerateResponse]]) -> None:
    # They are more than the slots: all are parked, so each has given its slot to the next.
    until(lambda: settled(server, len(stalled)), STALL_SECONDS)
    assert server.metric("concertina_streams_running") == 0
    memory = server.metric("concertina_process_resident_memory_bytes")
    tokens = server.metric("concertina_generation_tokens_total")

    # Others are served as ever, whatever connection they get behind a balancer.
    for _ in range(2 * CONNECTIONS):
        with Client(server.address) as client:
            stream = client.generate("x", model=TEXT, max_tokens=200, ignore_eos=True, timeout=SOON)
            assert isinstance(list(stream)[-1], Finished)
    drawn = server.metric("concertina_generation_tokens_total") - tokens
    assert drawn == 2 * CONNECTIONS * 200
    assert server.metric("concertina_process_resident_memory_bytes") - memory < 16 * MEBIBYTE

    # Read on, beside one that still stalls on the same connection: nothing was lost.
    expected, position = 2, 0
    for response in stalled[0]:
        assert response.sequence == expected
        expected += 1
        if response.HasField("tokens"):
            assert response.tokens.first_position == position
            position += len(response.tokens.ids)
    assert response.HasField("finished")
    assert position == CONTEXT
