"""The table of sessions against a plain one that looks at every session each time."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server import lazy_heap
from server.checkpoint import TokenLogprobs
from server.engine.stream import Stream
from server.request import Lease, LogitsProcessors, SamplingParameters
from server.sessions import table
from server.sessions.table import Session, SessionTable
from tests.server.engines import BYTES, ask

_OWNERS = ("ada", "bob", "cy")


def _session(owner: str, stream_id: str, outputs: int = 1, keep_s: float = 60.0) -> Session:
    requests = [ask(sampling=SamplingParameters(output=n)) for n in range(outputs)]
    lease, nobody = Lease(stream_id, tuple(requests), owner, keep_s), SimpleNamespace()
    streams = tuple(Stream(lease, request, nobody, "B", BYTES) for request in requests)  # type: ignore[arg-type]
    return Session(lease, streams, (), (), [])


class _Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Books(RuleBasedStateMachine):
    """A table, and beside it all sessions with what each of them uses."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = _Clock()
        self.table = SessionTable()
        self.held: list[Session] = []
        self.replaced: list[Session] = []  # by another of the same name, but not dropped yet
        self.sizes: dict[Session, int] = {}  # of those at rest
        self.left: list[Session] = []  # in this order

    def _with_clock(self, method: Any, *args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(table, "time", self.clock)
            return method(*args)

    def _forget(self, session: Session) -> None:
        for stream in session.streams:
            stream.ended = True
            self.table.ended(stream)
        self.table.drop(session)
        for books in (self.held, self.replaced, self.left):
            if session in books:
                books.remove(session)
        self.sizes.pop(session, None)

    @rule(
        owner=st.sampled_from(_OWNERS),
        name=st.integers(0, 9),
        outputs=st.integers(1, 3),
        keep_s=st.integers(1, 5),
        ended=st.integers(0, 3),
    )
    def add(self, owner: str, name: int, outputs: int, keep_s: int, ended: int) -> None:
        session = _session(owner, f"{owner} {name}", outputs, keep_s)
        for stream in session.streams[:ended]:
            stream.ended = True
        before = self.table.add(session)
        same = [s for s in self.held if s.lease.stream_id == session.lease.stream_id]
        assert same == ([] if before is None else [before])
        self.held.append(session)
        if before is not None:
            self.held.remove(before)
            self.replaced.append(before)

    @rule(data=st.data(), size=st.integers(0, 100))
    @precondition(lambda self: self.held)
    def leave(self, data: st.DataObject, size: int) -> None:
        session = data.draw(st.sampled_from(self.held))
        self._with_clock(self.table.leave, session)
        if session in self.left:
            self.left.remove(session)
        self.left.append(session)
        self._rest(session, size)

    @rule(data=st.data(), size=st.integers(0, 100))
    @precondition(lambda self: self.held)
    def end(self, data: st.DataObject, size: int) -> None:
        session = data.draw(st.sampled_from(self.held))
        for stream in session.streams:
            if not stream.ended:
                stream.ended = True
                self.table.ended(stream)
                break
        self._rest(session, size)

    def _rest(self, session: Session, size: int) -> None:
        if session.ended and session.left_at is not None:
            self.table.rest(session, size)
            self.sizes[session] = size

    @rule(data=st.data())
    @precondition(lambda self: self.held)
    def attach(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(self.held))
        self.table.attach(session)
        if session in self.left:
            self.left.remove(session)
        self.sizes.pop(session, None)

    @rule(data=st.data())
    @precondition(lambda self: self.held or self.replaced)
    def forget(self, data: st.DataObject) -> None:
        self._forget(data.draw(st.sampled_from(self.held + self.replaced)))

    @rule(passed=st.integers(0, 3))
    def expire(self, passed: int) -> None:
        self.clock.now += passed
        due = {session for session in self.left if session.expires_at <= self.clock.now}
        gone = set()
        while (session := self.table.expired(self.clock.now)) is not None:
            gone.add(session)
            self._forget(session)
        assert gone == due

    @rule(limit=st.integers(0, 400))
    def evict(self, limit: int) -> None:
        while (session := self.table.surplus(limit)) is not None:
            assert sum(self.sizes.values()) > limit
            held = {owner: self._resting(owner) for owner in _OWNERS}
            owner = session.lease.owner
            assert held[owner] == max(held.values())
            theirs = [s for s in self.sizes if s.lease.owner == owner]
            assert session.left_at == min(s.left_at or 0.0 for s in theirs)
            self._forget(session)
        assert sum(self.sizes.values()) <= limit

    def _resting(self, owner: str) -> int:
        return sum(size for s, size in self.sizes.items() if s.lease.owner == owner)

    @invariant()
    def counts_agree(self) -> None:
        assert len(self.table) == len(self.held)
        assert set(self.table.all()) == set(self.held)
        assert self.table.num_left == len(self.left)
        assert self.table.resting_bytes == sum(self.sizes.values())
        expiries = [session.expires_at for session in self.left]
        assert self.table.next_expiry == min(expiries, default=float("inf"))
        for owner in _OWNERS:
            theirs = [s for s in self.held + self.replaced if s.lease.owner == owner]
            running = sum(not stream.ended for s in theirs for stream in s.streams)
            assert self.table.running(owner) == running


Books.TestCase.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
TestBooks = Books.TestCase


class _Counted(float):
    """A number that counts how often it is compared."""

    compared = 0

    def __lt__(self, other: float) -> bool:
        _Counted.compared += 1
        return float(self) < float(other)


def test_many_sessions_of_one_owner_cost_another_owner_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As ten forks of 128 copies each do; neither a session goes, nor does the work grow."""
    put = lazy_heap.LazyHeap.put
    monkeypatch.setattr(
        lazy_heap.LazyHeap, "put", lambda self, item, key: put(self, item, _Counted(key))
    )
    books, limit = SessionTable(), 100_000
    other = _session("other", "theirs")
    books.add(other)
    books.leave(other)
    other.streams[0].ended = True
    books.ended(other.streams[0])
    books.rest(other, 5_000)
    work, gone = [], 0
    for number in range(1_280):
        copy = _session("forker", str(number))
        copy.streams[0].ended = True
        _Counted.compared = 0
        books.add(copy)
        books.leave(copy)
        books.rest(copy, 1_000)
        while (surplus := books.surplus(limit)) is not None:
            assert surplus.lease.owner == "forker" and surplus.lease.stream_id == str(gone)
            books.drop(surplus)
            gone += 1
        work.append(_Counted.compared)
        assert books.find("theirs", "other") is other
    assert len(books) == 1 + 95 and gone == 1_280 - 95
    print(f"comparisons for each: {sum(work) / len(work):.1f}, most {max(work)}")
    assert sum(work[640:]) < 1.5 * sum(work[:640])


@pytest.mark.parametrize("sessions", [100, 10_000])
def test_the_work_for_a_session_does_not_grow(
    sessions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = lazy_heap.LazyHeap.put
    monkeypatch.setattr(
        lazy_heap.LazyHeap, "put", lambda self, item, key: put(self, item, _Counted(key))
    )
    books = SessionTable()
    _Counted.compared = 0
    for number in range(sessions):
        session = _session(f"owner {number % 7}", str(number))
        books.add(session)
        books.leave(session)
        books.rest(session, 10)
    for session in books.all():
        books.attach(session)
        books.leave(session)
        books.rest(session, 11)
        books.drop(session)
    print(f"{_Counted.compared / sessions:.1f} comparisons for each of {sessions}")
    assert _Counted.compared / sessions < 150


def test_what_a_stream_retains_is_counted() -> None:
    top = TokenLogprobs(-1.0, tuple(range(5)), (-1.0,) * 5)
    processors = LogitsProcessors(allowed=tuple(range(200)))
    sampling = SamplingParameters(logprobs=5)
    lease, nobody = Lease("name", ()), SimpleNamespace()

    def stream(**changes: Any) -> Stream:
        return Stream(lease, ask(**changes), nobody, "H", BYTES)  # type: ignore[arg-type]

    assert stream().retained_bytes == 0
    assert stream(prompt=b"x" * 100).retained_bytes == 100
    second = SamplingParameters(output=1)
    assert stream(prompt=b"x" * 100, sampling=second).retained_bytes == 0  # the first one's
    generated = stream(sampling=sampling)
    generated.history = array("H", range(50))
    assert generated.retained_bytes == 100
    generated.logprobs = [top] * 50
    assert generated.retained_bytes > 100 + 50 * 5 * 60
    listed = stream(sampling=SamplingParameters(processors=processors))
    assert listed.retained_bytes >= 200 * 28
    assert stream(stop=("x" * 200,) * 16).retained_bytes >= 16 * 200
