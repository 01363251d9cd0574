"""What a user was promised of each stream, and whether what the calls tell agrees with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from concertina.v1 import generation_service_pb2 as pb
from tests.server.sessions.replicas import Call, Replica, story

READING = ("Generate", "Resume", "Continue")
_MAX, _PAUSED = pb.FINISH_REASON_MAX_TOKENS, pb.FINISH_REASON_PAUSED


@dataclass(eq=False)
class Promise:
    """A stream that was accepted. It has one story: `prefix`, then what follows from it by `seed`.

    Its limit is so many times `size` behind the prompt as it was continued from there, and once.
    seed: None while nobody has told it, which is so for copies.
    """

    stream_id: str
    owner: str
    home: Replica
    prefix: bytes
    seed: int | None
    start: int
    size: int
    kept: bool
    key: str = ""
    durable: bool = False
    """Somebody was told that it is."""
    reached: int = 0
    """As far somebody has read."""
    fewest: int = 0
    """So many times it was continued from its limit, at least."""
    most: int = 0
    """So often it may have been continued."""
    may_be_paused: bool = False
    may_have_expired: bool = False
    may_be_lost: bool = False
    deleting: bool = False
    deleted: bool = False
    """The user was told so."""
    calls: list[Told] = field(default_factory=list)

    def tokens(self, begin: int, end: int) -> tuple[int, ...]:
        """A part of the story."""
        assert self.seed is not None or end <= len(self.prefix), "nobody may know these tokens yet"
        return story(self.prefix, self.seed or 0, end)[begin:]

    def is_limit(self, position: int, fewest: int = 0) -> bool:
        """Whether it may end here by itself."""
        times, rest = divmod(position - self.start, self.size)
        return rest == 0 and 1 + fewest <= times <= 1 + self.most

    @property
    def binds(self) -> bool:
        """Whether it has to be there, at its home at least."""
        gone = self.deleting or self.may_have_expired or self.may_be_lost
        return self.kept and not gone

    def binds_at(self, replica: Replica) -> bool:
        """Whether this replica has to know it."""
        return self.binds and (self.durable or self.home is replica)

    def comes_again(self, told: Told) -> None:
        """It is accepted again for its key: it may have been lost and begin anew, but is here."""
        if not self.binds:
            self.reached = self.fewest = 0
            self.durable = False
        self.home = told.call.replica
        self.deleted = self.may_have_expired = self.may_be_lost = False  # a deletion may be found

    def others(self, told: Told) -> list[Told]:
        """The calls about it that came later than this one, or were under way when it came."""
        mine = self.calls.index(told)
        return [
            each
            for at, each in enumerate(self.calls)
            if each is not told and (at > mine or each.until >= told.began)
        ]


@dataclass(eq=False)
class Told:
    """A call, and what it has told.

    began, until: the steps of the test at which it began and ended. troubled: its replica could
    not rely on the store meanwhile.
    """

    call: Call
    began: int
    promise: Promise | None = None
    until: float = float("inf")
    troubled: bool = False
    had_deleted: bool = False
    """The stream was deleted before."""
    sequence: int = 0
    base: int | None = None
    position: int | None = None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    ending: str = ""
    """FINISHED, PAUSED, HANDED_OVER, or the code of an error."""
    accepted: bool = False
    """Whether it reads a stream, or its answer is OK."""
    seen: int = 0

    def __repr__(self) -> str:
        code = self.call.code.name if self.call.code else self.ending or "accepted"
        return f"{self.call} ({self.began} to {self.until}: {code})"

    @property
    def method(self) -> str:
        return self.call.method

    def cursor(self) -> dict[str, Any]:
        """With what a reader resumes behind this call."""
        where = {"tokens": len(self.ids), "characters": len(self.text), "last_ids": self.ids[-3:]}
        return {"after_sequence": self.sequence, "cursors": [where]}

    def go_on_behind(self, former: Told) -> None:
        """It resumes with the cursor of a former call."""
        self.sequence, self.base, self.position = former.sequence, former.base, former.position
        self.ids, self.text = [*former.ids], former.text

    def take(self, event: pb.GenerateResponse) -> None:
        """Check the next event. Its promise is known by now."""
        promise = self.promise
        assert promise is not None
        assert event.sequence == self.sequence + 1, "events are lost or come twice"
        assert not self.ending, f"something comes behind the end, {self.ending}"
        self.sequence += 1
        match event.WhichOneof("event"):
            case "accepted":
                assert self.sequence == 1 and event.accepted.stream_id == promise.stream_id
                seed = event.accepted.sampling.seed
                assert promise.seed in (None, seed), "the seed changed"
                promise.seed = seed
                promise.durable |= event.accepted.durable
                assert not (self.had_deleted and not self.troubled), "it is read though deleted"
            case "tokens":
                self._take_tokens(promise, event.tokens)
            case "finished":
                self._finish(promise, event.finished)
            case "handed_over":
                self.ending = "HANDED_OVER"
            case "error":
                self.ending = event.error.code
            case other:
                raise AssertionError(f"an event {other}")

    def _take_tokens(self, promise: Promise, tokens: pb.Tokens) -> None:
        if self.position is None:
            self.base = self.position = tokens.first_position
            assert self.position >= promise.start
            if self.method == "Continue" and promise.is_limit(self.position):
                times = (self.position - promise.start) // promise.size
                promise.fewest = max(promise.fewest, times)
        assert tokens.first_position == self.position, "tokens are lost or come twice"
        self.position += len(tokens.ids)
        expected = promise.tokens(tokens.first_position, self.position)
        assert tuple(tokens.ids) == expected, "it is another story"
        assert tokens.text == bytes(expected).decode()
        self.ids += tokens.ids
        self.text += tokens.text
        promise.reached = max(promise.reached, self.position)

    def _finish(self, promise: Promise, finished: pb.Finished) -> None:
        """The end of the stream is where the tokens end, and its reason fits."""
        if finished.reason == _PAUSED:
            self.ending = "PAUSED"
            assert promise.may_be_paused, "nobody has paused it"
        else:
            self.ending = "FINISHED"
            assert finished.reason == _MAX
            where = self.position
            assert where is None or promise.is_limit(where), "it ends too early or too late"
