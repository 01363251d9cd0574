"""A reader that stops reading costs a parked stream: no slot, no memory, and nobody else's time."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from concertina.client import Client, Finished
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import generation_service_pb2_grpc
from tests.e2e.conftest import CONTEXT, SLOTS
from tests.e2e.servers import Server, until

TEXT = "long-text"
READERS = 2 * SLOTS
STALL_SECONDS = 60.0
MEBIBYTE = 1024 * 1024

# What fits between server and reader: small, so that a stall is felt after thousands of tokens.
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16 * 1024))


@pytest.fixture
def stalled(server: Server) -> Iterator[list[Iterator[pb.GenerateResponse]]]:
    """Streams of one connection that were begun and are not read on."""
    request = pb.GenerateRequest(
        model=TEXT, stopping=pb.StoppingCriteria(max_tokens=CONTEXT, ignore_eos=True)
    )
    with grpc.insecure_channel(server.address, options=SMALL_WINDOW) as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        calls = [stub.Generate(request, timeout=300) for _ in range(READERS)]
        for call in calls:
            next(call)
        yield calls


def test_stalled_readers(
    server: Server, client: Client, stalled: list[Iterator[pb.GenerateResponse]]
) -> None:
    # More of them than there are slots: all are parked, so each gave its slot to the next.
    until(lambda: server.metric("concertina_streams_paused") == READERS, STALL_SECONDS)
    assert server.metric("concertina_streams_running") == 0
    memory = server.metric("concertina_process_resident_memory_bytes")
    tokens = server.metric("concertina_generation_tokens_total")

    for _ in range(3):
        events = list(client.generate("x", model=TEXT, max_tokens=500, ignore_eos=True, timeout=20))
        assert isinstance(events[-1], Finished)
    assert server.metric("concertina_generation_tokens_total") == tokens + 3 * 500
    grown = server.metric("concertina_process_resident_memory_bytes") - memory
    assert grown < 16 * MEBIBYTE

    # Read on: the stream is whole, as if nothing had been.
    expected, position = 2, 0
    for response in stalled[0]:
        assert response.sequence == expected
        expected += 1
        if response.HasField("tokens"):
            assert response.tokens.first_position == position
            position += len(response.tokens.ids)
    assert response.HasField("finished")
    assert position == CONTEXT
