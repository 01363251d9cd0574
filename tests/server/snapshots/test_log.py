"""A stream in the store is a log: what is read is its story, and writes grow as it grows."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from server.bundles.bundle import Bundle
from server.checkpoint import Checkpoint, Finish, FinishReason, SavedState, TokenLogprobs
from server.errors import SnapshotRefused
from server.request import Lease, Request, SamplingParameters, prompt_of
from server.snapshots.availability import Availability
from server.snapshots.names import (
    TokensPart,
    chain,
    end_name,
    origin_name,
    parts_of,
    replaced,
    state_name,
    tokens_name,
)
from server.snapshots.sealer import Sealer
from server.snapshots.store import Store
from server.snapshots.writer import SnapshotWriter

LIMIT_S = 30.0
PAUSED = Finish(FinishReason.PAUSED, None, 3, 0.1, 0.2, 0.3, 40)
REQUEST = Request(
    prompt_of(256, list(b"An abacus"), "B"), SamplingParameters(logprobs=1), max_tokens=10**6
)


def lease(prompt: bytes = b"An abacus", outputs: int = 1, epoch: int = 1) -> Lease:
    one = replace(REQUEST, prompt=prompt_of(256, list(prompt), "B"))
    requests = [
        replace(one, sampling=replace(one.sampling, output=output)) for output in range(outputs)
    ]
    return Lease("s", tuple(requests), "me", 60.0, epoch=epoch)


def saved(pushed: int) -> SavedState:
    """A state that tells where it is from."""
    return SavedState({"keys": np.full(4, pushed, np.float32)}, pushed)


def at(story: bytes, pushed: int = 0, finish: Finish | None = None, base: int = 0) -> Checkpoint:
    """How far an output is that has generated `story`."""
    return Checkpoint(
        array("B", story),
        saved(pushed) if pushed else None,
        finish,
        [TokenLogprobs(-float(token), (token,), (-float(token),)) for token in story],
        base,
        base,
    )


@dataclass
class Counting:
    """Counts the bytes of what is created in a store, by kind."""

    created: dict[str, int] = field(default_factory=dict)
    count: int = 0

    def watch(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        create = store.create

        def counting(owner: str, stream_id: str, name: str, content: bytes, *rest: Any) -> None:
            create(owner, stream_id, name, content, *rest)
            kind = name.split("-")[2] if name.count("-") > 1 else name.split("-")[-1]
            self.created[kind] = self.created.get(kind, 0) + len(content)
            self.count += 1

        monkeypatch.setattr(store, "create", counting)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}")


Open = Callable[[], SnapshotWriter]


@pytest.fixture
def open_writer(store: Store) -> Iterator[Open]:
    opened: list[SnapshotWriter] = []

    def open_one() -> SnapshotWriter:
        opened.append(SnapshotWriter(store, Sealer([bytes(32)]), 60.0))
        return opened[-1]

    yield open_one
    for writer in opened:
        writer.close(LIMIT_S)


def write(writer: SnapshotWriter, text: Bundle, stream: Lease, *checkpoints: Checkpoint) -> None:
    """Offers snapshots of the first output, one after the other."""
    for checkpoint in checkpoints:
        writer.offer(text, stream, 0, checkpoint)
        assert writer.flush(LIMIT_S) == 0


def read(writer: SnapshotWriter, output: int = 0) -> Any:
    """What can be read of an output."""
    snapshot = writer.load("me", "s")
    assert snapshot is not None
    return snapshot.content.outputs[output]


def require(stored: Any, story: bytes, pushed: int = 0) -> None:
    """That an output has this story, with its log-probabilities, and a state from there."""
    assert stored.generated == story
    assert [each.logprob for each in stored.logprobs] == [-float(token) for token in story]
    assert stored.pushed == pushed
    values = {name: np.frombuffer(content, "<f4") for name, content in stored.state.items()}
    assert {name: set(value) for name, value in values.items()} == (
        {"keys": {pushed}} if pushed else {}
    )


def test_what_is_written_grows_as_the_stream_grows(
    text: Bundle, store: Store, open_writer: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B12: once with each snapshot, all was written again."""
    written: list[dict[str, int]] = []
    writer, prompt = open_writer(), bytes(50_000)
    for tokens in (8_192, 16_384, 32_768):
        counting = Counting()
        with monkeypatch.context() as patch:
            counting.watch(store, patch)
            stream = replace(lease(prompt), stream_id=f"s{tokens}")
            writer.begin(text, stream)
            story = bytes(number % 251 for number in range(tokens))
            for end in range(256, tokens + 1, 256):
                checkpoint = replace(at(story[:end], end), logprobs=())
                writer.offer(text, stream, 0, checkpoint)
                assert writer.flush(LIMIT_S) == 0
        written.append(counting.created)
        snapshot = writer.load("me", stream.stream_id)
        assert snapshot is not None
        assert snapshot.content.outputs[0].generated == story
        assert snapshot.content.request.prompt == prompt
        names = store.names("me", stream.stream_id)
        assert len(parts_of(names, 1, 0).tokens) <= tokens / 256 / 8 + 1
        assert set(parts_of(names, 1, 0).states) == {tokens - 256, tokens}
    for half, whole in pairwise(written):
        assert half["origin"] == pytest.approx(whole["origin"], abs=10)
        assert 1.8 * half["tokens"] <= whole["tokens"] <= 2.2 * half["tokens"]
        assert whole["state"] == pytest.approx(2 * half["state"], rel=0.02)
    assert written[-1]["tokens"] < 9 * 32_768 + 128 * 400


def test_a_takeover_writes_nothing_again(
    text: Bundle, store: Store, open_writer: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, stream, story = open_writer(), lease(bytes(20_000)), bytes(range(250)) * 40
    writer.begin(text, stream)
    write(writer, text, stream, at(story, 29_000))
    counting = Counting()
    counting.watch(store, monkeypatch)
    for epoch in range(2, 6):
        open_writer().begin(text, replace(stream, epoch=epoch), [at(story, 29_000)])
        require(read(writer), story, 29_000)
    assert counting.count == 4
    assert counting.created["origin"] < 4 * 600


def test_an_origin_has_what_the_store_lacks(text: Bundle, store: Store, open_writer: Open) -> None:
    """A stream is continued before its last snapshot is written."""
    writer, stream = open_writer(), lease()
    writer.begin(text, stream)
    write(writer, text, stream, at(b"abc", 10))
    writer.begin(text, replace(stream, epoch=2), [at(b"abcdef", 14, base=6)])
    require(read(writer), b"abcdef", 14)
    assert read(writer).base_tokens == 6
    write(writer, text, replace(stream, epoch=2), at(b"abcdefgh", 16, base=6))
    require(read(writer), b"abcdefgh", 16)
    open_writer().begin(text, replace(stream, epoch=3), [at(b"abcdefgh", 16, base=6)])
    require(read(writer), b"abcdefgh", 16)
    assert read(writer).base_tokens == 6


def test_times_are_those_of_the_last_call(text: Bundle, store: Store, open_writer: Open) -> None:
    """A6: a continuation does not count the rest before it."""
    writer, stream = open_writer(), lease()
    writer.begin(text, stream)
    write(writer, text, stream, replace(at(b"abc"), queue_s=1.0, first_token_s=2.0))
    assert (read(writer).queue_seconds, read(writer).first_token_seconds) == (1.0, 2.0)
    writer.begin(text, replace(stream, epoch=2), [at(b"abc")])
    assert not read(writer).HasField("first_token_seconds")
    then = replace(at(b"abcd"), queue_s=3.0, first_token_s=4.0)
    write(writer, text, replace(stream, epoch=2), then)
    assert (read(writer).queue_seconds, read(writer).first_token_seconds) == (3.0, 4.0)


@pytest.mark.parametrize(("story", "pushed"), [(b"abc", 10), (b"abcdef", 10), (b"abcdef", 14)])
def test_what_a_claim_adopted_stays(
    text: Bundle,
    store: Store,
    open_writer: Open,
    monkeypatch: pytest.MonkeyPatch,
    story: bytes,
    pushed: int,
) -> None:
    """Its former owner finds the claim right after it wrote, and clears up what nobody needs."""
    old, new, stream = open_writer(), open_writer(), lease()
    old.begin(text, stream)
    create = store.create

    def claimed(owner: str, stream_id: str, name: str, *rest: Any) -> None:
        create(owner, stream_id, name, *rest)
        if name == state_name(1, 0, 14):
            monkeypatch.setattr(store, "create", create)
            new.begin(text, replace(stream, epoch=2), [at(story, pushed)])

    write(old, text, stream, at(b"abc", 10))
    monkeypatch.setattr(store, "create", claimed)
    write(old, text, stream, at(b"abcdef", 14))
    require(read(new), story, pushed)
    assert (state_name(1, 0, 14) in store.names("me", "s")) == (pushed == 14)


def test_a_new_prompt_takes_the_place_of_the_story(
    text: Bundle, store: Store, open_writer: Open
) -> None:
    """Continue with a prompt: the former prompt, the output and more; the state stays."""
    writer, stream = open_writer(), lease()
    writer.begin(text, stream)
    write(writer, text, stream, at(b"abc", 8), at(b"abcdef", 14, PAUSED))
    longer = replace(lease(b"An abacusabcdef and"), epoch=2)
    writer.begin(text, longer, [at(b"", 14)])
    require(read(writer), b"", 14)
    assert not read(writer).HasField("finish")
    snapshot = writer.load("me", "s")
    assert snapshot is not None
    assert snapshot.content.request.prompt == b"An abacusabcdef and"
    write(writer, text, longer, at(b"xyz", 20), at(b"xyzxyz", 24), at(b"xyzxyzxyz", 28))
    require(read(writer), b"xyzxyzxyz", 28)
    kept = {tokens_name(2, 0, 0, 9), state_name(2, 0, 24), state_name(2, 0, 28), origin_name(2)}
    assert store.names("me", "s") - {origin_name(1)} == kept


def test_of_damaged_states_an_older_one_is_used(
    text: Bundle, store: Store, open_writer: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """A state is a shortcut. Tokens are the story."""
    writer, stream = open_writer(), lease()
    writer.begin(text, stream)
    write(writer, text, stream, at(b"abc", 10), at(b"abcdef", 14))
    require(read(writer), b"abcdef", 14)
    _damage(store, state_name(1, 0, 14))
    require(read(writer), b"abcdef", 10)
    assert "an older one is" in caplog.text
    _damage(store, state_name(1, 0, 10))
    require(read(writer), b"abcdef")
    _damage(store, tokens_name(1, 0, 0, 6))
    with pytest.raises(SnapshotRefused, match="was changed"):
        read(writer)
    store.remove("me", "s", [tokens_name(1, 0, 0, 6)])
    require(read(writer), b"")  # it is computed again


def test_what_an_origin_adopted_must_be_there(
    text: Bundle, store: Store, open_writer: Open
) -> None:
    writer, stream = open_writer(), lease()
    writer.begin(text, stream)
    write(writer, text, stream, at(b"abc", 10))
    writer.begin(text, replace(stream, epoch=2), [at(b"abc", 10)])
    store.remove("me", "s", [state_name(1, 0, 10)])
    require(read(writer), b"abc")
    store.remove("me", "s", [tokens_name(1, 0, 0, 3)])
    with pytest.raises(SnapshotRefused, match="lacks tokens 0 to 3"):
        read(writer)


def test_parts_cannot_be_exchanged(text: Bundle, store: Store, open_writer: Open) -> None:
    """Whoever can write to the store, but has no key, cannot make another story of the parts."""
    writer, stream = open_writer(), lease(outputs=2)
    writer.begin(text, stream)
    write(writer, text, stream, at(b"abc", 10))
    writer.offer(text, stream, 1, at(b"xyz", 10))
    assert writer.flush(LIMIT_S) == 0
    require(read(writer, 1), b"xyz", 10)
    mine, other = tokens_name(1, 0, 0, 3), tokens_name(1, 1, 0, 3)
    content = store.get("me", "s", [mine, other])
    store.remove("me", "s", [mine])
    store.create("me", "s", mine, content[other])
    with pytest.raises(SnapshotRefused, match=f"{mine} was stored as {other}"):
        read(writer)
    with pytest.raises(SnapshotRefused, match="no export"):
        writer.import_(content[other], "me")


def test_a_stream_that_expired_in_the_store_is_not_stored(
    text: Bundle, store: Store, open_writer: Open
) -> None:
    writer, stream = open_writer(), lease()
    told: list[tuple[int, bool]] = []
    writer.on_stored = lambda lease, stored: told.append((lease.epoch, stored))
    writer.begin(text, stream)
    write(writer, text, stream, at(b"abc", 10))
    assert told == []
    store.delete("me", "s")
    write(writer, text, stream, at(b"abcd", 11), at(b"abcde", 12))
    assert told == [(1, False)] * 2
    assert store.names("me", "s") == set()
    writer.begin(text, replace(stream, epoch=2), [at(b"abcde", 12)])  # it is continued
    require(read(writer), b"abcde", 12)


def test_a_name_that_is_used_again_begins_anew(
    text: Bundle, store: Store, open_writer: Open
) -> None:
    writer, stream = open_writer(), lease()
    for story in (b"abcdef", b"xyz"):
        writer.begin(text, stream)
        write(writer, text, stream, at(story, 10))
        require(read(writer), story, 10)
        writer.forget("me", "s")
        store.delete("me", "s")  # the tombstone, too


def test_a_stream_ends_where_its_owner_says(text: Bundle, store: Store, open_writer: Open) -> None:
    """It was paused while it computed tokens again that the store had: those do not come back."""
    writer, stream = open_writer(), lease()
    writer.begin(text, stream)
    write(writer, text, stream, at(b"abcdef", 10))
    writer.begin(text, replace(stream, epoch=2), [at(b"abcdef", 10)])
    write(writer, text, replace(stream, epoch=2), at(b"abc", 12, PAUSED))
    require(read(writer), b"abc", 12)
    assert read(writer).finish.reason == "paused"
    assert end_name(2, 0) in store.names("me", "s")
    other = open_writer()
    other.begin(text, replace(stream, epoch=3), [at(b"abc", 12, PAUSED)])
    require(read(writer), b"abc", 12)
    assert read(writer).finish.reason == "paused"
    other.begin(text, replace(stream, epoch=4), [at(b"abc", 12)])
    write(other, text, replace(stream, epoch=4), at(b"abcxyz", 14))
    require(read(writer), b"abcxyz", 14)
    assert not read(writer).HasField("finish")


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_chain_has_no_gap(count: int) -> None:
    parts = [TokensPart(3 * number, 3 * number + 4, f"{number}") for number in range(count)]
    assert chain(parts, 0) == parts
    assert chain(parts, 0, 7) == parts[:2]
    assert chain(parts[1:], 0) == []
    assert chain([*parts[:3], *parts[4:]], 0) == parts[:3]
    longer = sorted([*parts, TokensPart(0, 20, "all")])
    assert [part.name for part in chain(longer, 2)] == ["all", *(["6"] if count == 7 else [])]
    assert replaced(parts_of([], 1, 0), 2) == []


def test_what_another_part_holds_is_replaced() -> None:
    names = [tokens_name(1, 0, *each) for each in ((0, 8), (8, 9), (8, 12), (8, 10), (12, 13))]
    names += [state_name(1, 0, pushed) for pushed in (2, 10, 9)] + [end_name(1, 0)]
    parts = parts_of([*names, tokens_name(1, 1, 0, 99), tokens_name(2, 0, 0, 99)], 1, 0)
    gone = [tokens_name(1, 0, 8, 9), tokens_name(1, 0, 8, 10), state_name(1, 0, 2)]
    assert sorted(replaced(parts, 2)) == sorted(gone)


def _damage(store: Store, name: str) -> None:
    (content,) = store.get("me", "s", [name]).values()
    store.remove("me", "s", [name])
    store.create("me", "s", name, content[:-1] + bytes([content[-1] ^ 1]))


class Story(RuleBasedStateMachine):
    """One stream with two outputs, whose owners change, and beside it what has to be read of it.

    States of the model are as old as they like; the store fails now and then.
    """

    bundle: Bundle
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(f"file://{self.folder}/{uuid4().hex}")
        self.store.backend.create = self._create  # type: ignore[method-assign]
        self.create = type(self.store.backend).create
        self.failing = 0
        self.writer = SnapshotWriter(self.store, Sealer([bytes(32)]), 60.0)
        self.lease = lease(outputs=2)
        self.stories = [b"", b""]  # as the owner has them
        self.stored = [b"", b""]  # as they were when they were written last
        self.ended = [False, False]
        self.writer.begin(self.bundle, self.lease)

    def _create(self, path: str, content: bytes) -> None:
        if self.failing and "probes" not in path:
            self.failing -= 1
            raise OSError("planted")
        self.create(self.store.backend, path, content)

    def teardown(self) -> None:
        self.writer.close(LIMIT_S)

    @rule(output=st.integers(0, 1), more=st.binary(max_size=20), behind=st.integers(0, 9))
    def grow(self, output: int, more: bytes, behind: int) -> None:
        if not self.ended[output]:
            self.stories[output] += more
            self._offer(output, behind)

    @rule(output=st.integers(0, 1))
    def end(self, output: int) -> None:
        if not self.ended[output]:
            self.ended[output] = True
            self._offer(output, 0)

    def _offer(self, output: int, behind: int) -> None:
        pushed = max(0, 9 + len(self.stories[output]) - behind)
        finish = PAUSED if self.ended[output] else None
        self.writer.offer(self.bundle, self.lease, output, at(self.stories[output], pushed, finish))

    @rule(count=st.integers(1, 3))
    def fail(self, count: int) -> None:
        self.failing = count

    @rule()
    def flush(self) -> None:
        assert self.writer.flush(LIMIT_S) == 0
        self.stored = list(self.stories)

    def _checkpoints(self, stories: list[bytes]) -> list[Checkpoint]:
        ended = [PAUSED if each else None for each in self.ended]
        return [at(story, 0, end) for story, end in zip(stories, ended, strict=True)]

    @rule()
    def take_over(self) -> None:
        """By another server, which knows what is stored."""
        self.flush()
        self.failing = 0
        taken = SnapshotWriter(self.store, Sealer([bytes(32)]), 60.0)
        snapshot = taken.load("me", "s")
        assert snapshot is not None
        stories = [b"", b""]
        for stored in snapshot.content.outputs:
            stories[stored.output] = stored.generated
        assert stories == self.stories
        self.lease = replace(self.lease, epoch=snapshot.epoch + 1)
        self._until_up(lambda: taken.begin(self.bundle, self.lease, self._checkpoints(stories)))
        self.writer.close(LIMIT_S)
        self.writer = taken

    @precondition(lambda self: all(self.ended))
    @rule()
    def go_on(self) -> None:
        """It is continued by its owner, whose last snapshots may wait."""
        self.failing = 0
        self.ended = [False, False]
        self.lease = replace(self.lease, epoch=self.lease.epoch + 1)
        checkpoints = self._checkpoints(self.stories)
        self._until_up(lambda: self.writer.begin(self.bundle, self.lease, checkpoints))
        self.stored = list(self.stories)

    def _until_up(self, begin: Callable[[], None]) -> None:
        limit = time.monotonic() + LIMIT_S
        while True:
            try:
                return begin()
            except OSError:
                assert time.monotonic() < limit
                time.sleep(0.01)

    @invariant()
    def what_is_read_was_written(self) -> None:
        snapshot = self.writer.load("me", "s")
        assert snapshot is not None
        assert snapshot.epoch == self.lease.epoch
        assert bytes(snapshot.content.request.prompt) == b"An abacus"
        read = {stored.output: stored for stored in snapshot.content.outputs}
        for output, (stored, story) in enumerate(zip(self.stored, self.stories, strict=True)):
            found = read.get(output)
            got = b"" if found is None else found.generated
            assert len(stored) <= len(got) <= len(story)
            assert story.startswith(got)
            if found is not None and found.pushed:
                require(found, got, found.pushed)
                assert found.pushed <= 9 + len(got)


def test_what_is_read_is_what_was_written(
    text: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Availability, "shortest_pause_s", 0.001)
    monkeypatch.setattr(Availability, "longest_pause_s", 0.01)
    Story.bundle, Story.folder = text, tmp_path
    run_state_machine_as_test(Story, settings=settings(max_examples=30, stateful_step_count=20))
