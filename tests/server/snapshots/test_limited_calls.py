"""Calls that may hang, and the threads that they run on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.snapshots.limited_calls import LimitedCalls

LIMIT_S = 30.0


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    """Those who call."""
    with ThreadPoolExecutor(16) as pool:
        yield pool


class Hanging:
    """A call that hangs until it may go on, and tells its thread."""

    def __init__(self) -> None:
        self.go_on, self.began = threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None

    def __call__(self) -> str:
        self.thread = threading.current_thread()
        self.began.set()
        assert self.go_on.wait(LIMIT_S)
        return "late"


def until(condition: Callable[[], object]) -> None:
    """Wait for something that happens soon."""
    tick = threading.Event()
    for _ in range(int(LIMIT_S / 0.002)):
        if condition():
            return
        tick.wait(0.002)
    raise AssertionError("it does not happen")


def test_one_thread_does_one_call_after_another() -> None:
    calls = LimitedCalls(8)
    threads = {calls.call(LIMIT_S, threading.current_thread) for _ in range(50)}
    # The thread of a call may still be on its way back when the next one comes.
    assert len(threads) <= 2


def test_what_fails_lends_its_thread_too() -> None:
    calls, threads = LimitedCalls(8), set[threading.Thread]()

    def fail() -> None:
        threads.add(threading.current_thread())
        raise OSError("planted")

    for _ in range(50):
        with pytest.raises(OSError, match="planted"):
            calls.call(LIMIT_S, fail)
    assert len(threads) <= 2


def test_idle_threads_end(callers: ThreadPoolExecutor) -> None:
    calls, together = LimitedCalls(8), threading.Barrier(8)
    calls.idle_limit_s = 0.05

    def meet() -> threading.Thread:
        together.wait(LIMIT_S)
        return threading.current_thread()

    asked = [callers.submit(calls.call, LIMIT_S, meet) for _ in range(8)]
    threads = {each.result(LIMIT_S) for each in asked}
    assert len(threads) == 8
    until(lambda: not any(thread.is_alive() for thread in threads))
    assert calls.call(LIMIT_S, threading.current_thread) not in threads


def test_a_call_that_hangs_lends_no_thread() -> None:
    calls, hanging = LimitedCalls(4), Hanging()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        calls.call(0.05, hanging)
    others = {calls.call(LIMIT_S, threading.current_thread) for _ in range(20)}
    assert hanging.thread not in others
    hanging.go_on.set()
    assert hanging.thread is not None
    calls.idle_limit_s = 0.0
    until(lambda: not hanging.thread.is_alive())  # then it is like any other


def test_while_all_hang_nobody_waits() -> None:
    calls, hanging = LimitedCalls(2), [Hanging(), Hanging()]
    for each in hanging:
        with pytest.raises(TimeoutError, match="no answer"):
            calls.call(0.02, each)
    with pytest.raises(TimeoutError, match="2 calls hang, 2 run"):
        calls.call(LIMIT_S, threading.current_thread)
    hanging[0].go_on.set()
    until(lambda: _works(calls))
    hanging[1].go_on.set()


def test_after_a_hang_the_next_waits_its_turn_again(callers: ThreadPoolExecutor) -> None:
    calls, hanging = LimitedCalls(1), Hanging()
    with pytest.raises(TimeoutError, match="no answer"):
        calls.call(0.02, hanging)
    hanging.go_on.set()
    until(lambda: _works(calls))
    busy = Hanging()
    first = callers.submit(calls.call, LIMIT_S, busy)
    assert busy.began.wait(LIMIT_S)
    second = callers.submit(calls.call, LIMIT_S, lambda: "second")
    with pytest.raises(TimeoutError):
        second.result(0.05)
    assert not second.done()
    busy.go_on.set()
    assert (first.result(LIMIT_S), second.result(LIMIT_S)) == ("late", "second")


def test_one_that_waits_for_others_is_told_that_they_hang(callers: ThreadPoolExecutor) -> None:
    calls, hanging = LimitedCalls(1), Hanging()
    first = callers.submit(calls.call, 0.2, hanging)
    assert hanging.began.wait(LIMIT_S)
    second = callers.submit(calls.call, LIMIT_S, threading.current_thread)
    for asked in (first, second):
        with pytest.raises(TimeoutError):
            asked.result(LIMIT_S / 2)
    hanging.go_on.set()


@pytest.mark.parametrize("idle_limit_s", [0.0, 0.0005, LIMIT_S])
def test_calls_of_the_same_moment_all_run(callers: ThreadPoolExecutor, idle_limit_s: float) -> None:
    """Also when a thread is free for one of them only, or is about to end."""
    calls = LimitedCalls(8)
    calls.idle_limit_s = idle_limit_s
    for number in range(300):
        together = threading.Barrier(2 + number % 3)
        asked = [
            callers.submit(calls.call, LIMIT_S, lambda barrier=together: barrier.wait(LIMIT_S / 3))
            for _ in range(together.parties)
        ]
        assert sorted(each.result(LIMIT_S) for each in asked) == list(range(together.parties))


def test_what_comes_late_is_told_once() -> None:
    calls, hanging, late = LimitedCalls(2), Hanging(), list[str]()
    with pytest.raises(TimeoutError):
        calls.call(0.02, hanging, lambda: late.append("late"))
    assert late == []
    hanging.go_on.set()
    until(lambda: late)
    assert calls.call(LIMIT_S, lambda: "in time", lambda: late.append("never")) == "in time"
    assert late == ["late"]


def test_a_thread_that_cannot_be_started_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = LimitedCalls(1)

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as failing:
        failing.setattr(threading.Thread, "start", fail)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="start new thread"):
                calls.call(LIMIT_S, threading.current_thread)
    assert _works(calls)


def _works(calls: LimitedCalls) -> bool:
    try:
        return calls.call(LIMIT_S, lambda: True)
    except TimeoutError:
        return False
