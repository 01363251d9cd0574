"""Two replicas, one store, and whatever can happen to them: every stream has one story.

Rules run one after another. So that calls interleave, what happens on a thread stands at a gate
(see `gates`), and a rule opens one gate. The promises are in `promises`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import session_service_pb2 as session_pb
from server.auth.api_keys import Caller
from server.snapshots.store import Store
from tests.server.sessions.gates import Gate, Stage
from tests.server.sessions.promises import READING, Promise, Told
from tests.server.sessions.replicas import (
    ANN,
    CALLERS,
    CONTEXT,
    KEEP_S,
    Call,
    Replica,
    Shelf,
    SmallRuntime,
    imported,
    wanted,
)

SIZE, PROMPT = 12, b"ab"
_LONGEST = CONTEXT - 2 * SIZE
_MOST_GATES = 4000
_REQUESTS = {
    "Resume": pb.ResumeRequest,
    "Pause": session_pb.PauseRequest,
    "Continue": session_pb.ContinueRequest,
    "Fork": session_pb.ForkRequest,
    "Export": session_pb.ExportRequest,
    "Delete": session_pb.DeleteRequest,
}

SIDE = st.integers(0, 1)
INDEX = st.integers(0, 9)
OWNER = st.sampled_from(list(CALLERS))
WHAT = st.sampled_from(["fails", "hangs", "stays away", "expire", "kill", "drain"])
BEGINNING = st.sampled_from(["", "runs", "is not kept", "left", "left", "paused", "ended"])
METHOD = st.sampled_from(
    ["Resume", "Resume", "Pause", "Continue", "Fork", "Export", "Delete", "Delete"]
)
OUTCOME = st.sampled_from(["done", "done", "done", "lands", "fails"])


class Story(RuleBasedStateMachine):
    """The model is in `promises`, one for each stream that was accepted."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage()
        self.shelf = Shelf()
        self.patches = pytest.MonkeyPatch()
        self.replacing = self.stage.replacing()
        self.replacing.__enter__()
        self.patches.setattr(logging.root.manager, "disable", logging.CRITICAL)
        self.patches.setattr(
            "server.engine.engine.Runtime", lambda _, rows, *more: SmallRuntime(self.stage, rows)
        )
        self.replicas: list[Replica] = []
        self.made = 0
        self.trouble: dict[Replica, int] = {}  # the last step at which its store failed
        self.step = self.checked = 0
        self.calls: list[Told] = []
        self.promises: dict[str, Promise] = {}
        self.exported: list[tuple[Promise, bytes, int]] = []
        self.imports: dict[Told, tuple[Promise, int]] = {}
        self.reached_before: dict[Told, int] = {}
        for _ in range(2):
            self.replicas.append(self.new_replica())

    def new_replica(self) -> Replica:
        self.made += 1
        replica = Replica(self.stage, self.shelf, f"{'AB'[len(self.replicas) % 2]}{self.made}")
        self.stage.settle()
        return replica

    def teardown(self) -> None:
        try:
            if self.checked == self.step:
                self.come_to_an_end()
        finally:
            self.stage.close()
            self.replacing.__exit__(None, None, None)
            self.patches.undo()

    @initialize(
        side=SIDE,
        owner=OWNER,
        beginning=BEGINNING,
        methods=st.lists(METHOD, max_size=2),
        away=st.booleans(),
    )
    def begin(self, side: int, owner: str, beginning: str, methods: list[str], away: bool) -> None:
        """Most tests begin with a stream that is somewhere, and with calls about it."""
        if not beginning:
            return
        self.generate(side, owner, 1, beginning != "is not kept", "")
        self.store(side, 4)
        self.think(side, 4)
        self.all_is_as_promised()
        if beginning == "left":
            self.give_up(0)
        if beginning == "paused":
            self.ask_about(0, "Pause", False, False)
        if beginning in ("paused", "ended"):
            self.rest()
            self.all_is_as_promised()
        self.meet(0, methods, away, False)

    # ---- calls

    @rule(
        side=SIDE,
        owner=OWNER,
        seed=st.integers(1, 3),
        kept=st.booleans(),
        key=st.sampled_from(["", "", "k", "l"]),
    )
    def generate(self, side: int, owner: str, seed: int, kept: bool, key: str) -> None:
        if key:
            seed, kept = ord(key), True  # the same request for the same key
        self.call(side, owner, "Generate", wanted(PROMPT, seed, SIZE, kept, key))

    @precondition(lambda self: self.promises)
    @rule(index=INDEX, method=METHOD, away=st.booleans(), behind=st.booleans())
    def ask_about(self, index: int, method: str, away: bool, behind: bool) -> None:
        """A call about a stream, where it was last or at the other replica."""
        self.ask_for(self.some_promise(index), method, away, behind)

    @precondition(lambda self: self.promises)
    @rule(
        index=INDEX,
        methods=st.lists(METHOD, min_size=2, max_size=4),
        away=st.booleans(),
        apart=st.sampled_from([False, False, True]),
    )
    def meet(self, index: int, methods: list[str], away: bool, apart: bool) -> None:
        """Calls about a stream at once, at one replica or at both."""
        promise = self.some_promise(index)
        for number, method in enumerate(methods):
            self.ask_for(promise, method, away ^ (apart and number % 2 == 1), False)

    @precondition(lambda self: self.exported)
    @rule(side=SIDE, index=INDEX)
    def bring(self, side: int, index: int) -> None:
        promise, sealed, reached = self.exported[index % len(self.exported)]
        told = self.call(side, promise.owner, "Import", imported(sealed))
        self.imports[told] = promise, reached

    @precondition(lambda self: self.open_calls)
    @rule(index=INDEX)
    def give_up(self, index: int) -> None:
        told = self.open_calls[index % len(self.open_calls)]
        self.step += 1
        told.call.give_up()

    # ---- what happens of itself

    @precondition(lambda self: self.stage.gates)
    @rule(index=INDEX, outcome=OUTCOME)
    def advance(self, index: int, outcome: str) -> None:
        """One pending operation goes on."""
        self.step += 1
        gates = self.stage.gates
        self.open(gates[index % len(gates)], outcome)

    @precondition(lambda self: self.stage.gates)
    @rule(side=SIDE, times=st.integers(1, 6))
    def think(self, side: int, times: int) -> None:
        """An engine goes on, whatever the store does."""
        self.step += 1
        for _ in range(times):
            for gate in self.gates_of(side, "engine", "inbox"):
                self.open(gate)

    @precondition(lambda self: self.stage.gates)
    @rule(side=SIDE, times=st.integers(1, 12))
    def store(self, side: int, times: int) -> None:
        """The store answers one replica."""
        self.step += 1
        for _ in range(times):
            for gate in self.gates_of(side, "store", "answer"):
                self.open(gate)

    @precondition(lambda self: self.stage.gates)
    @rule()
    def rest(self) -> None:
        """All that is under way ends."""
        self.step += 1
        self.open_all()

    @rule(side=SIDE, what=WHAT)
    def disturb(self, side: int, what: str) -> None:
        self.step += 1
        match what:
            case "fails":
                for gate in self.gates_of(side, "store", "answer"):
                    self.open(gate, "fails")
            case "hangs":  # as long as nobody waits for it; what hangs may be done later
                self.pass_time(Store.time_limit_s + 1)
            case "stays away":
                self.outlast()
            case "expire":
                for promise in self.promises.values():
                    if not any(each.accepted and not each.call.over for each in promise.calls):
                        promise.may_have_expired = True
                self.pass_time(KEEP_S + 1)
            case "kill":
                self.replace(side)
            case "drain":
                for promise in self.promises.values():
                    promise.may_be_lost |= not promise.durable
                self.replicas[side].drain()

    def outlast(self) -> None:
        """The store hangs until nobody waits for it any more: each wait has an end."""
        for _ in range(12):
            for side in range(2):
                for gate in self.gates_of(side, "engine", "inbox"):
                    self.open(gate)
            self.pass_time(Store.time_limit_s + 1)
        self.all_is_as_promised()
        waiting = [told for told in self.open_calls if not told.accepted]
        assert not waiting, f"these wait for the store without end: {waiting}"

    # ---- the parts of rules

    @property
    def open_calls(self) -> list[Told]:
        return [each for each in self.calls if not each.call.over]

    def some_promise(self, index: int) -> Promise:
        """The newest have the lowest numbers."""
        return list(self.promises.values())[-1 - index % len(self.promises)]

    def ask_for(self, promise: Promise, method: str, away: bool, behind: bool) -> None:
        if method == "Continue" and promise.start + SIZE * (promise.most + 1) > _LONGEST:
            return
        readers = [each for each in promise.calls if each.accepted and each.method in READING]
        last = readers[-1].call.replica if readers else promise.home
        side = self.replicas.index(last) if last in self.replicas else 0
        former = readers[-1] if method == "Resume" and behind and readers else None
        if former is not None and self.is_stale(former, promise):
            former = None
        self.ask(side ^ away, promise, method, former)

    def gates_of(self, side: int, *kinds: str) -> list[Gate]:
        process = self.replicas[side].process
        return [each for each in self.stage.gates if each.process is process and each.kind in kinds]

    def open(self, gate: Gate, outcome: str = "done") -> None:
        if gate.kind != "store":
            outcome = "done"
        if outcome == "fails":
            for replica in self.replicas:
                if replica.process is gate.process:
                    self.in_trouble(replica)
        self.stage.open(gate, outcome)
        self.notice_trouble()

    def notice_trouble(self) -> None:
        """Calls to a server that has lost its store may be refused."""
        for told in self.open_calls:
            told.troubled |= not told.call.replica.snapshots.is_up

    def open_all(self) -> None:
        self.stage.settle()
        for _ in range(_MOST_GATES):
            if not (gates := self.stage.gates):
                return
            for gate in gates:
                self.open(gate)
        raise AssertionError(f"this never ends: {gates}")

    def pass_time(self, seconds: float) -> None:
        for replica in self.replicas:
            self.in_trouble(replica)
        self.stage.pass_time(seconds)

    def in_trouble(self, replica: Replica) -> None:
        self.trouble[replica] = self.step
        for told in self.open_calls:
            told.troubled |= told.call.replica is replica

    def replace(self, side: int) -> None:
        """A replica vanishes, and another one takes its place."""
        for promise in self.promises.values():
            promise.may_be_lost |= not promise.durable
        self.replicas[side].kill()
        self.replicas[side] = self.new_replica()

    def is_stale(self, former: Told, promise: Promise) -> bool:
        """Whether the cursor of a reader counts from where the stream does not begin any more."""
        if former.ending in ("FINISHED", "PAUSED") or former.base is None:
            return True
        continued = [each for each in promise.others(former) if each.method == "Continue"]
        return any(not self.is_refused(each) for each in continued)

    @staticmethod
    def is_refused(told: Told) -> bool:
        return told.call.task.done() and not told.call.given_up and told.call.code is not None

    def ask(self, side: int, promise: Promise, method: str, former: Told | None = None) -> Told:
        fields: dict[str, Any] = {"stream_id": promise.stream_id}
        if former is not None:
            fields |= former.cursor()
        if method == "Fork":
            fields["n"] = 2
        if method == "Continue":
            promise.most += 1
        if method == "Pause":
            promise.may_be_paused = True
        if method == "Delete":
            promise.deleting = True
        told = self.call(side, promise.owner, method, _REQUESTS[method](**fields), promise, former)
        told.had_deleted = promise.deleted and method != "Delete"
        return told

    def call(
        self,
        side: int,
        owner: str,
        method: str,
        request: Any,
        promise: Promise | None = None,
        former: Told | None = None,
    ) -> Told:
        self.step += 1
        replica = self.replicas[side]
        told = Told(replica.call(owner, method, request), self.step, promise)
        told.troubled = not replica.snapshots.is_up
        if former is not None:
            told.go_on_behind(former)
        if promise is not None:
            promise.calls.append(told)
            self.reached_before[told] = promise.reached
        self.calls.append(told)
        for each in self.promises.values():
            if self.has_key_of(told, each):
                each.calls.append(told)
        self.stage.settle()
        return told

    # ---- what must hold

    @invariant()
    def all_is_as_promised(self) -> None:
        for told in self.calls:
            if told.until == float("inf"):
                self.look_at(told)
        for replica in self.replicas:
            for caller in CALLERS.values():
                if caller.max_streams is not None:
                    sessions = replica.model.sessions(caller.name)
                    running = sum(len(each.unfinished) for each in sessions)
                    assert running <= caller.max_streams, "a quota is exceeded"
        for side, replica in enumerate(self.replicas):
            if replica.is_drained and not any(t.call.replica is replica for t in self.open_calls):
                self.replace(side)
        self.checked = self.step

    def look_at(self, told: Told) -> None:
        """Check what a call has told since the last look."""
        call = told.call
        if told.method in READING:
            for event in call.events[told.seen :]:
                refused = event.WhichOneof("event") == "error" and call.code is not None
                if told.promise is None and not refused:
                    self.accept(told, event)
                if not refused:
                    told.take(event)
                    self.has_begun(told)
        told.seen = len(call.events)
        if call.over:
            told.until = self.step
            self.has_ended(told)

    def has_begun(self, told: Told) -> None:
        if told.accepted:
            return
        told.accepted = True
        promise = told.promise
        assert promise is not None
        others = promise.calls if told.method == "Continue" else []
        if others and not any(other is not told and other.until >= told.began for other in others):
            promise.may_be_paused = any(o.method == "Pause" and o.call.given_up for o in others)

    def accept(self, told: Told, event: pb.GenerateResponse) -> None:
        """A Generate is accepted: it makes a promise, or is about the one with its key."""
        assert event.WhichOneof("event") == "accepted", event
        stream_id, request, call = event.accepted.stream_id, told.call.request, told.call
        found = self.promises.get(stream_id)
        assert found is None or request.idempotency_key, "two streams of one name"
        if request.idempotency_key:
            for other in self.promises.values():
                if (other.owner, other.key) == (call.caller, request.idempotency_key):
                    assert other is found, "two streams of one key"
        if found is not None:
            found.comes_again(told)
        else:
            found = self.promises[stream_id] = Promise(
                stream_id,
                call.caller,
                call.replica,
                PROMPT,
                request.sampling.seed,
                len(PROMPT),
                SIZE,
                request.HasField("keep"),
                request.idempotency_key,
            )
            if request.idempotency_key:
                found.calls = [each for each in self.calls if self.has_key_of(each, found)]
        if told not in found.calls:
            found.calls.append(told)
        told.promise = found

    @staticmethod
    def has_key_of(told: Told, promise: Promise) -> bool:
        call = told.call
        return (
            told.method == "Generate"
            and call.request.idempotency_key == promise.key != ""
            and call.caller == promise.owner
        )

    def has_ended(self, told: Told) -> None:
        call = told.call
        if call.given_up or call.cut:
            return
        assert not call.task.cancelled()
        if (error := call.task.exception()) is not None:
            raise error
        if call.code is not None:
            self.check_refusal(told, call.code.name)
        elif told.method in READING:
            self.check_ending(told)
        else:
            told.accepted = True
            self.take_answer(told)

    def check_refusal(self, told: Told, code: str) -> None:
        promise, method = told.promise, told.method
        replica = told.call.replica
        if method == "Continue" and promise is not None and not self.is_in_doubt(told):
            promise.most -= 1
        text = f"{told.call} is refused: {code}, {told.call.details}"
        match code:
            case "UNAVAILABLE":
                assert told.troubled or replica.drained, text
            case "NOT_FOUND":
                if promise is not None:
                    assert not promise.binds_at(replica), text
            case "RESOURCE_EXHAUSTED":
                pass
            case "FAILED_PRECONDITION":
                assert method in ("Continue", "Fork", "Export", "Pause"), text
            case "ABORTED":
                assert promise is not None and promise.others(told), text
            case "INVALID_ARGUMENT":
                assert method in ("Generate", "Fork"), text
            case _:
                raise AssertionError(text)

    def is_in_doubt(self, told: Told) -> bool:
        """Whether something was stored for this call, and its server has not heard of it."""
        process = told.call.replica.process
        return any(each.process is process and each.kind == "answer" for each in self.stage.gates)

    def check_ending(self, told: Told) -> None:
        promise, replica = told.promise, told.call.replica
        assert promise is not None
        others = promise.others(told)
        match told.ending:
            case "FINISHED" | "PAUSED":
                pass
            case "HANDED_OVER":
                elsewhere = any(each.call.replica is not replica for each in promise.calls)
                assert replica.drained or elsewhere, "it is handed over to nobody"
            case "ABORTED":
                assert any(each.method == "Resume" for each in others), "nobody else has resumed it"
            case "NOT_FOUND":
                assert promise.deleting, f"{told}: nobody has deleted it: {promise.calls}"
            case "UNAVAILABLE":
                assert replica.drained
            case other:
                raise AssertionError(f"it ends with {other or 'nothing'}")

    def take_answer(self, told: Told) -> None:
        """What a call that is no stream promises by its answer."""
        call, promise = told.call, told.promise
        match told.method:
            case "Import":
                source, reached = self.imports[told]
                self.promise_copy(source, call, call.answer.session.stream_id, reached)
                return
            case "Fork":
                assert promise is not None
                assert len(call.answer.stream_ids) == call.request.n
                for stream_id in call.answer.stream_ids:
                    self.promise_fork(promise, call, stream_id)
            case "Export":
                assert promise is not None
                sealed = b"".join(part.part for part in call.events)
                before = replace(promise, may_be_paused=True)
                self.exported.append((before, sealed, self.reached_before[told]))
            case "Delete":
                assert promise is not None
                again = any(each.method == "Generate" for each in promise.others(told))
                if not again and (promise.durable or promise.home is call.replica):
                    promise.deleted = True

    def promise_copy(
        self, source: Promise, call: Call, stream_id: str, reached: int, **changed: Any
    ) -> None:
        """A copy has the story of its source, as it was when the call came or later."""
        assert stream_id not in self.promises
        self.promises[stream_id] = replace(
            source,
            stream_id=stream_id,
            home=call.replica,
            key="",
            durable=True,
            reached=reached,
            fewest=0,
            may_be_paused=True,
            may_have_expired=False,
            may_be_lost=False,
            deleting=False,
            deleted=False,
            calls=[],
            **changed,
        )

    def promise_fork(self, source: Promise, call: Call, stream_id: str) -> None:
        """It tells another story from where it was copied on."""
        session = call.replica.model.find(stream_id, call.caller)
        assert session is not None, "a copy is not there"
        stream = session.streams[0]
        at = len(stream.request.prompt) + len(stream.history)
        prefix = bytes(source.tokens(0, at))
        self.promise_copy(source, call, stream_id, at, prefix=prefix, seed=None)

    # ---- the end

    def come_to_an_end(self) -> None:
        """The store works, everything goes on to its end, and everything is as promised."""
        for _ in range(6):
            self.open_all()
            self.all_is_as_promised()
            if not self.open_calls and all(each.snapshots.is_up for each in self.replicas):
                break
            self.pass_time(31)
        assert not self.open_calls, f"these calls never end: {self.open_calls}"
        assert all(each.snapshots.is_up for each in self.replicas)
        for side, replica in enumerate(self.replicas):
            if replica.drained:
                self.replace(side)
        self.patches.setitem(CALLERS, "ann", Caller("ann"))  # what was given up still runs
        for number, promise in enumerate(list(self.promises.values())):
            self.read_to_the_end(promise, self.replicas[number % 2])
        for number, promise in enumerate(list(self.promises.values())):
            self.delete_for_good(promise, number % 2)
        self.patches.setitem(CALLERS, "ann", ANN)
        for side in range(2):
            self.leave_nothing(side)

    def do(self, side: int, promise: Promise, method: str) -> Told:
        """Make a call and let it end."""
        told = self.ask(side, promise, method)
        self.open_all()
        self.all_is_as_promised()
        assert told.call.over, f"it never ends: {told.call}"
        return told

    def read_to_the_end(self, promise: Promise, replica: Replica) -> None:
        """A reader who comes last gets the whole story."""
        if promise.binds and not promise.durable:
            replica = promise.home
        side = self.replicas.index(replica)
        told = self.do(side, promise, "Resume")
        if promise.deleted:
            assert not told.accepted, "it is alive behind its end"
        if not told.accepted:
            assert not promise.binds_at(replica)
            return
        if told.ending == "PAUSED":
            told = self.do(side, promise, "Continue")
            assert told.accepted, "it cannot be continued"
        assert told.ending == "FINISHED"
        if told.position is not None:
            assert told.position >= promise.reached, "tokens are lost"
            assert promise.is_limit(told.position, promise.fewest), "a continuation is lost"

    def delete_for_good(self, promise: Promise, side: int) -> None:
        """It is nowhere any more once this is answered."""
        if not promise.durable and promise.home is self.replicas[1 - side]:
            side = 1 - side
        told = self.do(side, promise, "Delete")
        assert told.accepted, "it cannot be deleted"
        for each in range(2):
            assert not self.do(each, promise, "Resume").accepted, "it is alive behind its end"
        names = self.replicas[side].call(promise.owner, "ListSessions", _LIST)
        self.open_all()
        assert promise.stream_id not in [each.stream_id for each in names.answer.sessions]

    def leave_nothing(self, side: int) -> None:
        """What nobody has promised is gone, and so is what it took."""
        replica = self.replicas[side]
        for owner, caller in CALLERS.items():
            for session in replica.model.sessions(owner):
                stream_id = session.lease.stream_id
                replica.call(owner, "Delete", session_pb.DeleteRequest(stream_id=stream_id))
            self.open_all()
            assert replica.registry.running(owner) == 0
            assert not replica.model.sessions(owner)
            for _ in range(caller.max_streams or 0):
                told = self.call(side, owner, "Generate", wanted(PROMPT, 9, SIZE, False, ""))
                assert not told.call.over, "a quota is not given back"
        self.open_all()
        self.all_is_as_promised()
        assert replica.model.is_empty


_LIST = session_pb.ListSessionsRequest()


class LongStory(Story):
    """The same, with more examples."""


TestStory = Story.TestCase
TestStory.settings = settings(
    max_examples=220,
    stateful_step_count=40,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
TestLongStory = pytest.mark.slow(pytest.mark.timeout(900)(LongStory.TestCase))
TestLongStory.settings = settings(TestStory.settings, max_examples=500)
