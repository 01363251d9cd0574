"""Admission: the limits, and the ledger over random lives of streams."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.bundle.resources import peak_state_bytes
from concertina.v1 import bundle_pb2 as pb
from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.engine.admission import Ledger, Pace, Refusal, Weight, check, limits, weigh
from server.engine.stream import Stream
from server.errors import InvalidRequest, Overloaded
from server.request import Lease, LogitsProcessors, Request, SamplingParameters, prompt_of
from server.sessions.subscriber import Deliveries, Subscriber
from tests.server.engines import BYTES, ask

MANIFEST = pb.Manifest(name="m", fold=pb.FoldSchedule(span=4))
MANIFEST.state.add(
    name="k", kind=pb.STATE_KIND_STACK, shape=[2, 9, 4], data_type=pb.DATA_TYPE_FLOAT32
)
ENTRY = 2 * 4 * 4
BUNDLE = Bundle(Path("nowhere"), MANIFEST)
LIMITS = Weight(streams=3, queue_tokens=100, state_bytes=1000)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def test_a_stream_weighs_its_prompt_and_its_largest_state() -> None:
    # A prompt of 5 and 5 more: the largest stack is that before the fold at 8.
    (weight,) = weigh(BUNDLE, [ask(b"12345", max_tokens=5)])
    assert weight == Weight(1, 5, (1 + 4) * ENTRY)
    (scored,) = weigh(BUNDLE, [ask(b"12345", max_tokens=90, score=True)])
    assert scored == Weight(1, 5, 4 * ENTRY)


def test_outputs_with_one_prompt_queue_it_once() -> None:
    prompt, other = (prompt_of(256, range(size), "B") for size in (5, 3))
    outputs = weigh(BUNDLE, [Request(prompt), Request(prompt), Request(other)])
    assert [weight.queue_tokens for weight in outputs] == [5, 0, 3]


def test_the_lists_of_a_request_weigh_once() -> None:
    """A kept stream holds them as long as its state: 150 MB of them must not go uncounted."""
    lists = LogitsProcessors(allowed=tuple(range(1000, 2000)), bias=((5, 1.0),) * 100)
    sampling = SamplingParameters(processors=lists)
    first = Request(prompt_of(256, [1, 2, 3], "B"), sampling=sampling, stop=("x" * 100,))
    bare, plain = weigh(BUNDLE, [Request(first.prompt)] * 2)
    heavy, second = weigh(BUNDLE, [first, replace(first, sampling=replace(sampling, output=1))])
    assert heavy.state_bytes - bare.state_bytes >= 1200 * 28 + 100
    assert second.state_bytes == plain.state_bytes


def test_limits_are_those_of_the_config_and_half_of_the_memory() -> None:
    config = EngineConfig(slots=2, queue_limit=3, queue_tokens=7)
    assert limits(config, 1000) == Weight(5, 7, 500)
    assert limits(EngineConfig(state_limit_bytes=9), 1000).state_bytes == 9


@pytest.mark.parametrize(
    ("held", "wanted", "reason", "message"),
    [
        (Weight(2, 99, 999), Weight(1, 1, 1), None, ""),
        (Weight(3, 0, 30), Weight(1, 0, 1), "queue_full", "3 of at most 3 streams"),
        (Weight(2, 60, 30), Weight(1, 41, 1), "queue_tokens", "60 of at most 100 prompt tokens"),
        (Weight(2, 0, 600), Weight(1, 0, 401), "state_bytes", "600 of at most 1000 bytes"),
        # A request is not refused by a limit to which it adds nothing.
        (Weight(2, 100, 0), Weight(1, 0, 1), None, ""),
        (Weight(3, 100, 1000), Weight(1, 1, 1), "queue_full", "--queue-limit"),
    ],
)
def test_the_first_limit_exceeded_refuses(
    held: Weight, wanted: Weight, reason: str | None, message: str
) -> None:
    refusal = check(held, wanted, LIMITS, Pace(), now=0)
    assert (refusal and refusal.reason) == reason
    if refusal is not None:
        assert message in refusal.message and "later" in refusal.message
        assert isinstance(refusal.error, Overloaded)
        assert refusal.error.retry_after_s == refusal.retry_after_s


@pytest.mark.parametrize(
    ("wanted", "remedy"),
    [
        (Weight(4, 0, 0), "fewer outputs"),
        (Weight(1, 101, 0), "shorter prompt"),
        (Weight(1, 0, 1001), "lower max_tokens"),
    ],
)
def test_a_request_that_never_fits_is_not_retryable(wanted: Weight, remedy: str) -> None:
    refusal = check(Weight(), wanted, LIMITS, Pace(), now=0)
    assert refusal is not None and remedy in refusal.message
    assert isinstance(refusal.error, InvalidRequest)
    assert "later" not in refusal.message


def test_the_wait_follows_the_recent_pace_of_endings() -> None:
    pace = Pace((0.0,))
    assert pace.retry_after_s(3, now=50.0) == 3.0  # no ending so far: a second each
    for end_s in (2.0, 4.0, 6.0):
        pace = pace.after(end_s)
    assert pace.retry_after_s(3, now=6.0) == pytest.approx(6.0)
    assert pace.retry_after_s(1, now=12.0) == pytest.approx(4.0)  # it has slowed down since
    assert pace.retry_after_s(1000, now=6.0) == 30.0
    assert Pace((0.0, 0.0)).retry_after_s(1, now=0.0) == 0.1
    for end_s in np.arange(6, 600, 0.5):
        pace = pace.after(float(end_s))
    assert len(pace.times_s) < 100
    assert pace.retry_after_s(1, now=599.5) == pytest.approx(0.5, rel=0.05)


@given(st.data())
def test_the_ledger_is_exact_in_any_order_of_events(
    loop: asyncio.AbstractEventLoop, data: st.DataObject
) -> None:
    """Requests begin or not and end in any order: the sums are those of the open streams."""
    ledger = Ledger(BUNDLE, Weight(8, 60, 4000))
    queued, begun = list[Stream](), list[Stream]()
    for now in range(data.draw(st.integers(1, 30))):
        act = data.draw(st.sampled_from(["submit", "submit", "begin", "end"]))
        if act == "submit":
            prompt = prompt_of(256, [0] * data.draw(st.integers(0, 29)), "B")
            tokens, outputs = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
            wanted = Request(prompt, max_tokens=tokens)
            streams = [
                Stream(
                    Lease("", (wanted,)),
                    wanted,
                    Subscriber(wanted, loop, Deliveries()),
                    "B",
                    BYTES,
                )
                for _ in range(outputs)
            ]
            before = ledger.held
            refusal = ledger.admit(streams, now)
            if refusal is None:
                queued += streams
            else:
                assert ledger.held == before
                assert isinstance(refusal, Refusal) and refusal.message.startswith("m: ")
        elif act == "begin" and queued:
            begun.append(queued.pop(data.draw(st.integers(0, len(queued) - 1))))
            ledger.began(begun[-1])
        elif act == "end" and queued + begun:
            place = data.draw(st.sampled_from([p for p in (queued, begun) if p]))
            ledger.ended(place.pop(data.draw(st.integers(0, len(place) - 1))), now)
        open_now = queued + begun
        assert ledger.held.streams == len(open_now) <= 8
        assert (ledger.full(now) is None) == (len(open_now) < 8)
        assert ledger.held.state_bytes <= 4000
        assert (
            0
            <= ledger.held.queue_tokens
            <= min(60, sum(len(stream.request.prompt) for stream in queued))
        )
        assert ledger.held.state_bytes == sum(
            peak_state_bytes(MANIFEST, stream.request.last_position) for stream in open_now
        )
    for stream in queued + begun:
        ledger.ended(stream, 100)
    assert ledger.held == Weight()
