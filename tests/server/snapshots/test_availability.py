"""Whether the store is away, and who tries it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY

from server.snapshots.availability import Availability

LIMIT_S = 30.0


def _retrying() -> int:
    """Number of threads that try a store; other threads come and go."""
    return sum(thread.name == "store retry" for thread in threading.enumerate())


class Probe:
    """Raises until the store is back."""

    def __init__(self) -> None:
        self.tries = 0
        self.is_back = False

    def __call__(self) -> None:
        self.tries += 1
        if not self.is_back:
            raise OSError("planted")


@pytest.fixture
def probe() -> Probe:
    return Probe()


@pytest.fixture
def back() -> threading.Event:
    return threading.Event()


@pytest.fixture
def availability(
    probe: Probe, back: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Availability]:
    """One that tries again soon."""
    monkeypatch.setattr(Availability, "shortest_pause_s", 0.005)
    monkeypatch.setattr(Availability, "longest_pause_s", 0.02)
    opened = Availability(probe, back.set)
    yield opened
    opened.close()


def test_without_a_thread_the_next_failure_tries_again(
    availability: Availability,
    probe: Probe,
    back: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever reports the failure gets no error of another kind, and is not told twice."""

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as failing:
        failing.setattr(threading.Thread, "start", fail)
        for _ in range(2):
            availability.failed(OSError("no route"))
            assert availability.is_up
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "no thread can be started to try the snapshot store again"
    ] * 2
    availability.failed(OSError("no route"))
    assert not availability.is_up
    assert REGISTRY.get_sample_value("concertina_store_up") == 0
    probe.is_back = True
    assert back.wait(LIMIT_S)
    assert availability.is_up
    assert REGISTRY.get_sample_value("concertina_store_up") == 1


def test_one_thread_tries_whoever_fails(
    availability: Availability, probe: Probe, back: threading.Event
) -> None:
    before = _retrying()
    reporting = [
        threading.Thread(target=availability.failed, args=(OSError("no route"),)) for _ in range(8)
    ]
    for thread in reporting:
        thread.start()
    for thread in reporting:
        thread.join(LIMIT_S)
    assert _retrying() == before + 1
    probe.is_back = True
    assert back.wait(LIMIT_S)


def test_a_failure_while_it_comes_back_is_not_lost(
    probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is told that the store is back fails at once."""
    monkeypatch.setattr(Availability, "shortest_pause_s", 0.005)
    ups: list[bool] = []
    over = threading.Event()

    def on_up() -> None:
        ups.append(availability.is_up)
        if len(ups) == 3:
            over.set()
        else:
            availability.failed(OSError("no route"))

    availability = Availability(probe, on_up)
    probe.is_back = True
    availability.failed(OSError("no route"))
    assert over.wait(LIMIT_S)
    assert ups == [True] * 3
    availability.close()


def test_after_its_end_nobody_tries(availability: Availability, probe: Probe) -> None:
    availability.close()
    availability.failed(OSError("no route"))
    assert availability.is_up
    assert probe.tries == 0
