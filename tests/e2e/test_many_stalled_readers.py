"""Sixty-four readers that stop reading cost the others nothing."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from concertina.client import Client, Tokens
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import generation_service_pb2_grpc
from tests.e2e.servers import Server, serving, until
from tests.e2e.test_stalled_reader import MEBIBYTE, SMALL_WINDOW, TEXT

STALLED, CHUNKS, READERS = 64, 3, 4
WINDOW_S, WINDOWS, ATTEMPTS = 1.0, 7, 3


@contextmanager
def _stalled(server: Server) -> Iterator[None]:
    """Readers that stop after a few chunks, until what lies between is full and all are paused."""
    request = pb.GenerateRequest(
        model=TEXT,
        stopping=pb.StoppingCriteria(ignore_eos=True),
        output=pb.OutputOptions(logprobs=20),  # many bytes a token, so that this is soon
    )
    calls = []  # one that nobody holds would be cancelled
    with ExitStack() as stack:
        for _ in range(STALLED):
            channel = stack.enter_context(grpc.insecure_channel(server.address, SMALL_WINDOW))
            stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
            calls.append(stub.Generate(request, timeout=600))
            for _ in range(1 + CHUNKS):
                next(calls[-1])
        until(lambda: server.metric("concertina_streams_paused") >= STALLED, 200)
        yield
    until(lambda: server.metric("concertina_streams_paused") <= READERS)


class _Readers(threading.Thread):
    """Some that read all the time, one stream after the other."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.tokens = 0
        self._address = address
        self.stop = threading.Event()

    def run(self) -> None:
        with Client(self._address) as client:
            while not self.stop.is_set():
                with client.generate(
                    model=TEXT, max_tokens=4000, ignore_eos=True, stream_interval=16, timeout=300
                ) as stream:
                    for event in stream:
                        if self.stop.is_set():
                            break
                        self.tokens += len(event.ids) if isinstance(event, Tokens) else 0


def _rates(readers: list[_Readers]) -> list[float]:
    """Tokens per second of all readers together, window by window."""
    rates = []
    for _ in range(WINDOWS):
        began, before = time.perf_counter(), sum(reader.tokens for reader in readers)
        time.sleep(WINDOW_S)
        tokens = sum(reader.tokens for reader in readers) - before
        rates.append(tokens / (time.perf_counter() - began))
    return rates


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_sixty_four_stalled_readers(long_bundle: Path) -> None:
    options = ("--slots", "8", "--queue-limit", "100", "--threads", "1", "--local")
    with serving(str(long_bundle), *options) as server:
        readers = [_Readers(server.address) for _ in range(READERS)]
        for reader in readers:
            reader.start()
        try:
            shares = []
            for _ in range(ATTEMPTS):
                alone = _rates(readers)
                with _stalled(server):
                    memory = server.metric("concertina_process_resident_memory_bytes")
                    beside = _rates(readers)
                    grown = server.metric("concertina_process_resident_memory_bytes") - memory
                alone += _rates(readers)
                shares.append(statistics.median(beside) / statistics.median(alone))
                print(f"beside {STALLED} stalled readers: {shares[-1]:.3f} of the rate alone;")
                print(f"memory grew by {grown / MEBIBYTE:.1f} MiB meanwhile")
                assert grown < 8 * MEBIBYTE
                if shares[-1] >= 0.95:
                    return
            raise AssertionError(f"others keep these shares of their rate: {shares}")
        finally:
            for reader in readers:
                reader.stop.set()
            for reader in readers:
                reader.join(30)
