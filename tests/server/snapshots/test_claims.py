"""A stream has one owner; what others write of it is not read, and deleted it stays deleted."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bundles.bundle import Bundle
from server.checkpoint import Checkpoint
from server.request import Lease, Request, prompt_of
from server.snapshots.claims import AlreadyClaimed
from server.snapshots.codec import restored
from server.snapshots.names import (
    TOMBSTONE,
    Claim,
    claim_in,
    end_name,
    epoch_of,
    origin_name,
    state_name,
    tokens_name,
)
from server.snapshots.sealer import Sealer
from server.snapshots.store import Store
from server.snapshots.writer import SnapshotWriter
from tests.server.snapshots.test_outages import until

LIMIT_S = 30.0
STREAM = Lease("s", (Request(prompt_of(256, [], "B"), max_tokens=50),), "me", keep_s=60.0)
TWO = replace(STREAM, requests=STREAM.requests * 2)


def at(text: str) -> Checkpoint:
    """How far an output is that has generated `text`."""
    return Checkpoint(array("B", text.encode()))


@pytest.fixture
def open_writer(uri: str) -> Iterator[Callable[[], SnapshotWriter]]:
    """Opens writers to one store."""
    opened: list[SnapshotWriter] = []

    def open_one() -> SnapshotWriter:
        opened.append(SnapshotWriter(Store(uri), Sealer([bytes(32)]), 60.0))
        return opened[-1]

    yield open_one
    for writer in opened:
        writer.close(LIMIT_S)


@pytest.fixture
def stream(request: pytest.FixtureRequest) -> Lease:
    """One that no other test has."""
    return replace(STREAM, owner=request.node.name)


Writers = Callable[[], SnapshotWriter]


def stored(writer: SnapshotWriter, stream: Lease) -> list[str]:
    """What can be read of a stream: its outputs."""
    snapshot = writer.load(stream.owner, stream.stream_id)
    assert snapshot is not None
    return [output.generated.decode() for output in snapshot.content.outputs]


def epoch(writer: SnapshotWriter, stream: Lease) -> Claim | None:
    return writer.newest_epoch(stream.owner, stream.stream_id)


def lost_by(writer: SnapshotWriter) -> list[tuple[int, bool]]:
    """Gets the epochs of the streams that a writer finds lost, and whether they are deleted."""
    lost: list[tuple[int, bool]] = []
    writer.on_lost = lambda lease, deleted: lost.append((lease.epoch, deleted))
    return lost


def test_an_epoch_is_claimed_once(text: Bundle, open_writer: Writers, stream: Lease) -> None:
    first, second = open_writer(), open_writer()
    assert epoch(first, stream) is None
    first.begin(text, stream)
    with pytest.raises(AlreadyClaimed, match="another server owns it") as raised:
        second.begin(text, stream, [at("abc")])
    assert raised.value.claim == Claim(1)
    assert stored(second, stream) == []
    second.begin(text, replace(stream, epoch=2), [at("abc")])
    with pytest.raises(AlreadyClaimed):
        first.begin(text, replace(stream, epoch=2), [at("x")])
    with pytest.raises(AlreadyClaimed) as raised:  # even if nothing is left of that epoch
        first.begin(text, stream)
    assert raised.value.claim == Claim(2)
    assert stored(first, stream) == ["abc"]
    assert epoch(first, stream) == Claim(2)


def test_of_those_who_claim_at_once_one_wins(
    text: Bundle, open_writer: Writers, stream: Lease
) -> None:
    writers = [open_writer() for _ in range(4)]
    writers[0].begin(text, stream)
    story = ""
    for claimed in range(2, 7):
        together = threading.Barrier(len(writers))

        def claim(
            number: int,
            claimed: int = claimed,
            together: threading.Barrier = together,
            story: str = story,
        ) -> bool:
            together.wait()
            try:
                mine = at(f"{story}{number}")
                writers[number].begin(text, replace(stream, epoch=claimed), [mine])
            except AlreadyClaimed as error:
                assert error.claim == Claim(claimed)
                return False
            return True

        with ThreadPoolExecutor(len(writers)) as pool:
            won = list(pool.map(claim, range(len(writers))))
        assert won.count(True) == 1
        story += f"{won.index(True)}"
        assert {tuple(stored(writer, stream)) for writer in writers} == {(story,)}


def test_snapshots_come_after_the_origin_whatever_the_clock(
    text: Bundle, open_writer: Writers, stream: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The origin is written by one whose clock is an hour ahead."""
    writer, two = open_writer(), replace(stream, requests=TWO.requests)
    monkeypatch.setattr("server.snapshots.codec.time.time", lambda: 4e9 + 3600)
    writer.begin(text, two, [at("a"), at("x")])
    monkeypatch.setattr("server.snapshots.codec.time.time", lambda: 4e9)
    writer.offer(text, two, 0, at("ab"))
    assert writer.flush(LIMIT_S) == 0
    assert stored(writer, two) == ["ab", "x"]
    snapshot = writer.load(two.owner, "s")
    assert snapshot is not None
    assert snapshot.epoch == restored(text, snapshot)[0].epoch == 1


def test_a_late_write_of_an_older_owner_is_not_read(
    text: Bundle, open_writer: Writers, stream: Lease
) -> None:
    """B2: Resume on B, Continue on B, then A, which still held it, drains."""
    old, new = open_writer(), open_writer()
    lost, kept = lost_by(old), lost_by(new)
    old.begin(text, stream)
    old.offer(text, stream, 0, at("abc"))
    assert old.flush(LIMIT_S) == 0
    assert lost == []
    taken = replace(stream, epoch=2)
    new.begin(text, taken, [at("ab")])
    assert stored(new, stream) == ["ab"]
    name, late = (
        tokens_name(1, 0, 3, 8),
        new.store.get(stream.owner, "s", [tokens_name(1, 0, 0, 3)]),
    )
    (content,) = late.values()
    new.store.create(stream.owner, "s", name, content)  # it lands now, and its writer dies
    assert stored(new, stream) == ["ab"]
    old.offer(text, stream, 0, at("abcdefgh"))
    assert old.flush(LIMIT_S) == 0
    assert stored(new, stream) == stored(old, stream) == ["ab"]
    assert lost == [(1, False)]
    new.offer(text, taken, 0, at("abcd"))
    assert new.flush(LIMIT_S) == 0
    assert stored(new, stream) == ["abcd"]
    assert kept == []


def test_what_waits_of_an_earlier_epoch_is_not_written(
    text: Bundle, open_writer: Writers, stream: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, go_on, busy = open_writer(), threading.Event(), threading.Event()
    create, written = writer.store.create, []
    lost = lost_by(writer)

    def slowly(owner: str, stream_id: str, name: str, *rest: Any) -> None:
        written.append(name)
        busy.set()
        assert go_on.wait(LIMIT_S)
        create(owner, stream_id, name, *rest)

    writer.begin(text, stream)
    other = replace(stream, stream_id="other")
    writer.begin(text, other)
    monkeypatch.setattr(writer.store, "create", slowly)
    writer.offer(text, other, 0, at("x"))
    assert busy.wait(LIMIT_S)
    for output in (0, 1):
        writer.offer(text, stream, output, at("abc"))
    with monkeypatch.context() as quick:
        quick.setattr(writer.store, "create", create)
        writer.begin(text, replace(stream, epoch=2), [at("ab")])
    writer.offer(text, replace(stream, epoch=2), 0, at("abcd"))
    writer.offer(text, stream, 0, at("abc"))  # the engine has not heard of it
    go_on.set()
    assert writer.flush(LIMIT_S) == 0
    assert written == [tokens_name(1, 0, 0, 1), tokens_name(2, 0, 2, 4)]
    assert lost == []
    assert stored(writer, stream) == ["abcd"]


def test_deleted_stays_deleted(text: Bundle, open_writer: Writers, stream: Lease) -> None:
    """B3: Delete on B while A runs the stream."""
    running, deleting = open_writer(), open_writer()
    lost = lost_by(running)
    running.begin(text, stream)
    running.offer(text, stream, 0, at("abc"))
    assert running.flush(LIMIT_S) == 0
    assert deleting.streams(stream.owner) == ["s"]
    deleting.forget(stream.owner, "s")
    deleting.forget(stream.owner, "s")
    running.offer(text, stream, 0, at("abcd"))
    assert running.flush(LIMIT_S) == 0
    assert lost == [(1, True)]
    for writer in (running, deleting):
        assert writer.load(stream.owner, "s") is None
        assert writer.streams(stream.owner) == []
        assert writer.store.names(stream.owner, "s") == {TOMBSTONE}
        claim = epoch(writer, stream)
        assert claim is not None
        assert claim.deleted
    for claimed in (1, 2):
        with pytest.raises(AlreadyClaimed, match="deleted") as raised:
            running.begin(text, replace(stream, epoch=claimed), [at("abcd")])
        assert raised.value.claim.deleted
    assert running.store.names(stream.owner, "s") == {TOMBSTONE}


def test_deletes_and_claims_at_once(text: Bundle, open_writer: Writers, stream: Lease) -> None:
    """Whoever is faster, in the end the stream is deleted."""
    claiming, deleting = open_writer(), open_writer()
    for number in range(8):
        one = replace(stream, stream_id=f"s{number}")
        claiming.begin(text, one)
        with ThreadPoolExecutor(2) as pool:
            claimed = pool.submit(claiming.begin, text, replace(one, epoch=2), [at("abc")])
            deleted = pool.submit(deleting.forget, one.owner, one.stream_id)
        deleted.result()
        assert isinstance(claimed.exception(), AlreadyClaimed | None)
        claiming.offer(text, replace(one, epoch=2), 0, at("abcd"))
        assert claiming.flush(LIMIT_S) == 0
        assert claiming.load(one.owner, one.stream_id) is None
        assert claiming.store.names(one.owner, one.stream_id) == {TOMBSTONE}


def test_what_was_never_stored_leaves_no_tombstone(open_writer: Writers, stream: Lease) -> None:
    writer = open_writer()
    writer.forget(stream.owner, "s")
    assert writer.store.names(stream.owner, "s") == set()
    assert epoch(writer, stream) is None


def test_readers_follow_who_writes_meanwhile(
    text: Bundle, open_writer: Writers, stream: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a reader saw the name of is gone when it reads it."""
    reader, owner = open_writer(), open_writer()
    owner.begin(text, stream)
    owner.offer(text, stream, 0, at("abc"))
    assert owner.flush(LIMIT_S) == 0
    get = reader.store.get

    def late(owner_: str, stream_id: str, names: set[str]) -> dict[str, bytes]:
        if tokens_name(1, 0, 0, 3) in names:
            owner.offer(text, stream, 0, at("abcde"))
            assert owner.flush(LIMIT_S) == 0
            assert tokens_name(1, 0, 0, 3) not in owner.store.names(stream.owner, "s")
        return get(owner_, stream_id, names)

    monkeypatch.setattr(reader.store, "get", late)
    assert stored(reader, stream) == ["abcde"]


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_claim_that_was_adopted_before_its_maker_knew_stays(
    is_lost: bool,
    text: Bundle,
    open_writer: Writers,
    stream: Lease,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever goes on in the next epoch reads the prompt from it; also if its answer is lost."""
    writer, other = open_writer(), open_writer()
    create = writer.store.create

    def late(owner: str, stream_id: str, *rest: Any) -> None:
        create(owner, stream_id, *rest)
        other.begin(text, replace(stream, epoch=2), [at("ab")])
        if is_lost:
            patch.setattr(writer.store, "get", _failing)
            raise OSError("the answer is lost")

    with monkeypatch.context() as patch:
        patch.setattr(writer.store, "create", late)
        with pytest.raises(OSError if is_lost else AlreadyClaimed):
            writer.begin(text, stream)
    until(lambda: writer.is_up)
    with pytest.raises(AlreadyClaimed):  # takes back what failed
        writer.begin(text, stream)
    assert stored(open_writer(), stream) == ["ab"]


@pytest.mark.parametrize("landed", [True, False])
def test_a_claim_whose_answer_got_lost_is_taken_back(
    landed: bool,
    text: Bundle,
    open_writer: Writers,
    stream: Lease,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether it is there or not: what its caller was told is that nothing has changed."""
    writer, other = open_writer(), open_writer()
    writer.begin(text, stream)
    taken, create = replace(stream, epoch=2), writer.store.create

    def lost(owner: str, stream_id: str, *rest: Any) -> None:
        if landed:
            create(owner, stream_id, *rest)
        patch.setattr(writer.store, "get", _failing)
        raise OSError("the answer is lost")

    with monkeypatch.context() as patch:
        patch.setattr(writer.store, "create", lost)
        with pytest.raises(OSError, match="is lost"):
            writer.begin(text, taken, [at("ab")])
    if not landed:
        other.begin(text, taken, [at("abc")])
    until(lambda: epoch(writer, stream) == Claim(1 if landed else 2) and writer.is_up)
    time.sleep(0.1)
    assert epoch(other, stream) == Claim(1 if landed else 2)
    if landed:
        writer.begin(text, taken, [at("ab")])
    else:
        with pytest.raises(AlreadyClaimed):
            writer.begin(text, taken, [at("ab")])
        assert stored(other, stream) == ["abc"]


def test_a_claim_that_is_there_is_made(
    text: Bundle, open_writer: Writers, stream: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer got lost."""
    writer, other = open_writer(), open_writer()
    create = writer.store.create

    def lost(*arguments: Any) -> None:
        create(*arguments)
        raise OSError("the answer is lost")

    monkeypatch.setattr(writer.store, "create", lost)
    writer.begin(text, stream)
    writer.begin(text, replace(stream, epoch=2), [at("ab")])
    assert stored(other, stream) == ["ab"]
    with pytest.raises(AlreadyClaimed):
        other.begin(text, replace(stream, epoch=2), [at("ab")])


def _failing(*arguments: Any) -> dict[str, bytes]:
    raise OSError("planted")


def test_nobody_withdraws_what_waits_of_others(
    text: Bundle, open_writer: Writers, stream: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that leaked is no use to other owners."""
    writer, go_on, busy = open_writer(), threading.Event(), threading.Event()
    create, other = writer.store.create, replace(stream, stream_id="other")

    def slowly(*arguments: Any) -> None:
        busy.set()
        assert go_on.wait(LIMIT_S)
        create(*arguments)

    writer.begin(text, stream)
    writer.begin(text, other)
    monkeypatch.setattr(writer.store, "create", slowly)
    writer.offer(text, other, 0, at("x"))
    assert busy.wait(LIMIT_S)
    writer.offer(text, stream, 0, at("abc"))
    writer.forget("somebody else", "s")
    go_on.set()
    assert writer.flush(LIMIT_S) == 0
    assert stored(writer, stream) == ["abc"]


EPOCHS, OUTPUTS, NUMBERS = st.integers(1, 3), st.integers(0, 2), st.integers(0, 9)
NAMES = st.one_of(
    st.builds(origin_name, EPOCHS),
    st.builds(tokens_name, EPOCHS, OUTPUTS, NUMBERS, NUMBERS),
    st.builds(state_name, EPOCHS, OUTPUTS, NUMBERS),
    st.builds(end_name, EPOCHS, OUTPUTS),
    st.sampled_from([TOMBSTONE, "origin", "0", "-1-origin", "00000001-origin.part", "junk"]),
)


@given(st.sets(NAMES))
def test_names_tell_who_owns_a_stream(names: set[str]) -> None:
    origins = [epoch for epoch in (1, 2, 3) if origin_name(epoch) in names]
    claim = claim_in(names)
    assert (claim is None) == (not origins and TOMBSTONE not in names)
    if claim is not None:
        assert claim == Claim(max(origins, default=0), TOMBSTONE in names)
        assert claim.is_above(2) == (claim.deleted or claim.epoch == 3)
    for name in names - {TOMBSTONE, "origin", "0", "-1-origin", "00000001-origin.part", "junk"}:
        assert name.startswith(f"0000000{epoch_of(name)}-")
    assert {epoch_of(name) for name in ("junk", TOMBSTONE, "00000001-origin.part")} == {-1}


def test_epochs_have_no_end() -> None:
    names = {origin_name(epoch) for epoch in (9, 10, 99_999_999, 100_000_000)}
    assert claim_in(names) == Claim(100_000_000)
