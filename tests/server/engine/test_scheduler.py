from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.scheduler import DECODE, Load, Plan, Prefilling, Waiting, next_credit, plan

EMPTY = Load(
    num_running=0,
    num_free=4,
    preemptible=(),
    returning=(),
    waiting=(),
    prefilling=None,
    prefill_room=8,
    prefill_credit_s=0.0,
)
FULL = {"num_free": 0, "num_running": 4}
PROMPT, NO_PROMPT, SCORE = Waiting(20, True), Waiting(0, True), Waiting(20, False)


def _plan(**changes: object) -> Plan:
    return plan(replace(EMPTY, **changes))  # type: ignore[arg-type]


@given(num_running=st.integers(1, 9), num_free=st.integers(0, 9), credit=st.floats(0, 1))
def test_without_others_the_running_streams_decode(
    num_running: int, num_free: int, credit: float
) -> None:
    """The loop does not ask then."""
    assert _plan(num_running=num_running, num_free=num_free, prefill_credit_s=credit) == DECODE


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ({}, Plan()),
        ({"waiting": (NO_PROMPT, NO_PROMPT)}, Plan(begin=2, decode=True)),
        ({"waiting": (PROMPT,)}, Plan(start_prefill=True)),
        (
            {"waiting": (NO_PROMPT, PROMPT, NO_PROMPT)},
            Plan(begin=1, start_prefill=True, decode=True),
        ),
        ({"num_free": 1, "waiting": (NO_PROMPT, PROMPT)}, Plan(begin=1, decode=True)),
        (
            {"num_free": 1, "waiting": (NO_PROMPT, SCORE)},
            Plan(begin=1, start_prefill=True, decode=True),
        ),
        # Full: no stream joins, but scoring needs no slot.
        ({"num_free": 0, "num_running": 4, "waiting": (NO_PROMPT,)}, Plan(decode=True)),
        ({"num_free": 0, "num_running": 4, "waiting": (PROMPT,)}, Plan(decode=True)),
        (
            {"num_free": 0, "num_running": 4, "waiting": (SCORE,)},
            Plan(start_prefill=True, decode=True),
        ),
        # The prefill slot: pushed up to its block's end, then joins and makes room for the next.
        ({"prefilling": Prefilling(20, True)}, Plan(prefill=8)),
        ({"prefilling": Prefilling(5, True)}, Plan(prefill=5)),
        ({"prefilling": Prefilling(0, True)}, Plan(join=True, decode=True)),
        (
            {"prefilling": Prefilling(0, True), "waiting": (PROMPT,)},
            Plan(join=True, start_prefill=True, decode=True),
        ),
        (
            {"prefilling": Prefilling(0, True), "num_free": 0, "num_running": 4},
            Plan(decode=True),
        ),
        ({"prefilling": Prefilling(20, True), "waiting": (SCORE,)}, Plan(prefill=8)),
        # One slot is kept for the stream in the prefill slot.
        (
            {"num_free": 1, "num_running": 3, "prefilling": Prefilling(9, True),
             "waiting": (NO_PROMPT,)},
            Plan(decode=True),
        ),
        (
            {"num_free": 2, "num_running": 2, "prefilling": Prefilling(9, True),
             "waiting": (NO_PROMPT, NO_PROMPT)},
            Plan(begin=1, decode=True),
        ),
        (
            {"num_free": 1, "num_running": 3, "prefilling": Prefilling(9, False),
             "waiting": (NO_PROMPT,)},
            Plan(begin=1, decode=True),
        ),
        # Returning streams go before new ones.
        (
            {"num_free": 1, "num_running": 3, "returning": (0, 0),
             "prefilling": Prefilling(0, True), "waiting": (NO_PROMPT,)},
            Plan(restore=1, decode=True),
        ),
        # A higher priority takes the slot of a lower one; an equal one does not.
        (
            {**FULL, "preemptible": (-1, 0), "waiting": (Waiting(0, True, 0), Waiting(0, True, 0))},
            Plan(preempt=1, begin=1, decode=True),
        ),
        (
            {**FULL, "preemptible": (-1, 0), "waiting": (Waiting(0, True, 1), Waiting(0, True, 1))},
            Plan(preempt=2, begin=2, decode=True),
        ),
        ({**FULL, "preemptible": (0, 0), "waiting": (Waiting(0, True, 0),)}, Plan(decode=True)),
        (
            {**FULL, "preemptible": (0,), "returning": (1, 0), "waiting": (Waiting(0, True, 1),)},
            Plan(preempt=1, restore=1, decode=True),
        ),
        (
            {**FULL, "preemptible": (0,), "returning": (0,), "waiting": (Waiting(0, True, 1),)},
            Plan(preempt=1, begin=1, decode=True),
        ),
        # A stream with a prompt pushes it before another one is parked for it.
        ({**FULL, "preemptible": (0,), "waiting": (Waiting(9, True, 1),)},
         Plan(start_prefill=True, decode=True)),
        ({**FULL, "preemptible": (0,), "prefilling": Prefilling(9, True, 1)}, Plan(decode=True)),
        ({**FULL, "preemptible": (0,), "prefilling": Prefilling(0, True, 1)},
         Plan(preempt=1, join=True, decode=True)),
        (
            {**FULL, "preemptible": (0, 1), "prefilling": Prefilling(0, True, 1),
             "waiting": (Waiting(0, True, 2),)},
            Plan(preempt=1, begin=1, decode=True),
        ),
        # Only a higher priority may take the slot that the prefilled stream claims.
        (
            {"num_free": 1, "num_running": 3, "prefilling": Prefilling(9, True, 0),
             "waiting": (Waiting(0, True, 1), Waiting(0, True, 1))},
            Plan(begin=1, decode=True),
        ),
        (
            {"num_free": 1, "num_running": 3, "prefilling": Prefilling(9, True, 1),
             "returning": (0,)},
            Plan(decode=True),
        ),
        # While a stream decodes, prefill needs credit.
        (
            {"num_free": 3, "num_running": 1, "prefilling": Prefilling(9, True)},
            Plan(decode=True),
        ),
        (
            {"num_free": 3, "num_running": 1, "prefilling": Prefilling(9, True),
             "prefill_credit_s": 1e-9},
            Plan(prefill=8, decode=True),
        ),
        ({"prefilling": Prefilling(9, True), "prefill_credit_s": -1.0}, Plan(prefill=8)),
    ],
)  # fmt: skip
def test_plan(load: dict[str, object], expected: Plan) -> None:
    assert _plan(**load) == expected


def test_only_an_empty_plan_is_idle() -> None:
    assert Plan().idle
    busy = (Plan(restore=1), Plan(begin=1), Plan(start_prefill=True), Plan(join=True))
    assert not any(p.idle for p in (*busy, Plan(prefill=1), Plan(decode=True)))


@dataclass
class Job:
    """A simulated stream: prompt, tokens, and when and for how many turns its reader lags."""

    number: int
    arrives: int
    priority: int
    prompt: int
    score: bool
    tokens: int
    pauses_at: int | None
    away: int
    begun: bool = False

    @property
    def place(self) -> tuple[int, int]:
        return -self.priority, self.number

    @property
    def ready(self) -> bool:
        """Whether it can join the batch at once."""
        return self.begun or not self.prompt


@dataclass
class World:
    """Executes plans as the engine does, with counters in place of a model."""

    slots: int
    span: int
    coming: list[Job]
    turn: int = 0
    waiting: list[Job] = field(default_factory=list)
    running: list[Job] = field(default_factory=list)
    paused: list[Job] = field(default_factory=list)
    prefilling: Job | None = None
    pushed: int = 0
    credit_s: float = 0.0
    seated: list[Job] = field(default_factory=list)
    preempted: int = 0

    def returning(self) -> list[Job]:
        return sorted((job for job in self.paused if job.away <= 0), key=lambda j: -j.priority)

    def preemptible(self) -> list[Job]:
        return sorted(self.running, key=lambda job: job.place, reverse=True)

    def load(self) -> Load:
        arrived = [job for job in self.coming if job.arrives <= self.turn]
        self.coming = [job for job in self.coming if job.arrives > self.turn]
        self.waiting = sorted(self.waiting + arrived, key=lambda job: job.place)
        self.turn += 1
        prefilling = self.prefilling
        return Load(
            num_running=len(self.running),
            num_free=self.slots - len(self.running),
            preemptible=tuple(job.priority for job in self.preemptible()),
            returning=tuple(job.priority for job in self.returning()),
            waiting=tuple(
                Waiting(0 if job.ready else job.prompt, not job.score, job.priority)
                for job in self.waiting[: self.slots + 1]
            ),
            prefilling=prefilling
            and Prefilling(
                prefilling.prompt - self.pushed, not prefilling.score, prefilling.priority
            ),
            prefill_room=self.span - self.pushed % self.span,
            prefill_credit_s=self.credit_s,
        )

    def execute(self, todo: Plan, decode_s: float, token_s: float) -> float:
        """Runs one turn. Returns the time of its prefill."""
        back, parked = self.returning()[: todo.restore], self.preemptible()[: todo.preempt]
        self.running = [job for job in self.running if job not in parked]
        self.waiting = sorted(self.waiting + parked, key=lambda job: job.place)
        self.paused = [job for job in self.paused if job not in back]
        joined = list(back)
        for _ in range(todo.begin):
            job = self.waiting.pop(0)
            assert job.ready and job not in parked
            self._begin(job)
            joined.append(job)
        if todo.join:
            assert self.prefilling is not None
            assert self.pushed == self.prefilling.prompt
            joined.append(self.prefilling)
            self.prefilling = None
        self.running += joined
        # Every parked stream is parked for one of higher priority.
        highest = sorted(joined, key=lambda job: -job.priority)
        assert len(parked) <= len(joined)
        assert all(p.priority < j.priority for p, j in zip(parked[::-1], highest, strict=False))
        self.preempted += len(parked)
        if todo.prefill:
            assert self.prefilling is not None
            assert self.pushed // self.span == (self.pushed + todo.prefill - 1) // self.span
            self.pushed += todo.prefill
            if self.prefilling.score and self.pushed == self.prefilling.prompt:
                self.prefilling = None
        if todo.start_prefill and not self.waiting[0].ready:
            assert self.prefilling is None
            self.prefilling, self.pushed = self.waiting.pop(0), 0
            self._begin(self.prefilling)
        assert len(self.running) <= self.slots
        if todo.decode:
            assert self.running
            for job in self.running:
                job.tokens -= 1
        self.paused += [job for job in self.running if job.tokens and job.tokens == job.pauses_at]
        self.running = [job for job in self.running if job.tokens and job not in self.paused]
        for job in self.paused:
            job.away -= 1
        prefill_s = todo.prefill * token_s
        self.credit_s = next_credit(self.credit_s, 0.5, prefill_s, decode_s if todo.decode else 0.0)
        return prefill_s

    def _begin(self, job: Job) -> None:
        if not job.begun:
            self.seated.append(job)
        job.begun = True


@st.composite
def jobs(draw: st.DrawFn, priorities: tuple[int, ...]) -> list[Job]:
    made, arrives = [], 0
    for number in range(draw(st.integers(1, 12))):
        prompt = draw(st.sampled_from([0, 0, 1, 3, 7, 8, 9, 30]))
        arrives += draw(st.sampled_from([0, 0, 0, 1, 5]))
        job = Job(
            number=number,
            arrives=arrives,
            priority=draw(st.sampled_from(priorities)),
            prompt=prompt,
            score=draw(st.booleans()) and prompt > 0,
            tokens=draw(st.integers(1, 12)),
            pauses_at=draw(st.none() | st.integers(1, 11)),
            away=draw(st.integers(0, 9)),
        )
        made.append(job)
    return made


def _serve(world: World, token_s: float) -> None:
    """Runs turns until all streams have ended."""
    for _ in range(5000):
        load = world.load()
        todo = plan(load)
        if todo.idle:
            # Only paused streams may be left, which wait for their readers.
            assert not world.running
            assert not world.waiting
            assert world.prefilling is None
            assert not load.returning
            if not world.paused and not world.coming:
                return
        assert todo.restore + todo.begin + todo.join <= load.num_free + todo.preempt
        world.execute(todo, decode_s=1.0, token_s=token_s)
    raise AssertionError(f"not done after 5000 turns: {world}")


@given(jobs((0,)), st.integers(1, 4), st.integers(1, 9), st.floats(0, 3))
def test_streams_are_served_in_order(
    jobs: list[Job], slots: int, span: int, token_s: float
) -> None:
    world = World(slots, span, jobs)
    _serve(world, token_s)
    assert world.seated == jobs
    assert not world.preempted


@given(jobs((-1, 0, 0, 7)), st.integers(1, 4), st.integers(1, 9), st.floats(0, 3))
def test_priorities_go_first_and_keep_the_order_within_one(
    jobs: list[Job], slots: int, span: int, token_s: float
) -> None:
    world = World(slots, span, jobs)
    _serve(world, token_s)
    assert len(world.seated) == len(jobs)
    for priority in (-1, 0, 7):
        own = [job.number for job in world.seated if job.priority == priority]
        assert own == sorted(own)
    # A stream takes a slot once, and once more after each pause. Each time it may preempt one of
    # lower priority, which may preempt another when it returns.
    taking = sum(1 + (job.pauses_at is not None) for job in jobs if job.priority > -1)
    assert world.preempted <= 2 * taking


PRIORITIES = st.integers(-2, 2)


@given(
    st.integers(0, 4),
    st.lists(PRIORITIES, max_size=4).map(sorted),
    st.lists(PRIORITIES, max_size=3).map(lambda them: sorted(them, reverse=True)),
    st.lists(PRIORITIES, max_size=6).map(lambda them: sorted(them, reverse=True)),
    st.none() | st.builds(Prefilling, st.sampled_from([0, 5]), st.booleans(), PRIORITIES),
)
def test_no_ready_stream_waits_for_a_lower_priority(
    free: int,
    running: list[int],
    returning: list[int],
    waiting: list[int],
    prefilling: Prefilling | None,
) -> None:
    todo = _plan(
        num_running=len(running),
        num_free=free,
        preemptible=tuple(running),
        returning=tuple(returning),
        waiting=tuple(Waiting(0, True, priority) for priority in waiting),
        prefilling=prefilling,
    )
    left = [*returning[todo.restore :], *waiting[todo.begin :]]
    if prefilling is not None and prefilling.joins and not prefilling.left and not todo.join:
        left.append(prefilling.priority)
    joined = [*returning[: todo.restore], *waiting[: todo.begin]]
    joined += [prefilling.priority] if prefilling is not None and todo.join else []
    kept = running[todo.preempt :]
    assert len(kept) + len(joined) <= len(running) + free
    assert max(left, default=-9) <= min([*kept, *joined], default=9)
    # No stream is parked while a slot is free, unless the prefilled stream claims it.
    claimed = prefilling is not None and prefilling.joins and not todo.join
    assert not todo.preempt or len(joined) - todo.preempt >= free - claimed


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75])
def test_prefill_gets_its_share_of_the_time(share: float) -> None:
    """Endless prompts and endless streams; a chunk takes as long as three steps."""
    credit_s = prefill_s = decode_s = 0.0
    for _ in range(3000):
        todo = _plan(
            num_running=3, num_free=1, prefilling=Prefilling(8, True), prefill_credit_s=credit_s
        )
        assert todo.decode
        spent = 0.03 if todo.prefill else 0.0
        credit_s = next_credit(credit_s, share, spent, 0.01)
        prefill_s += spent
        decode_s += 0.01
    assert prefill_s / (prefill_s + decode_s) == pytest.approx(share, rel=0.02)


def test_unused_credit_does_not_become_a_burst() -> None:
    credit_s = 0.0
    for _ in range(1000):
        credit_s = next_credit(credit_s, 0.5, 0.0, 0.01)
    assert 0 < credit_s <= 0.01


def test_prefill_without_running_streams_leaves_no_debt() -> None:
    """After a long prompt on an empty engine, the next prompt does not wait."""
    credit_s = 0.0
    for _ in range(100):
        credit_s = next_credit(credit_s, 0.5, 1.0, 0.0)
    assert next_credit(credit_s, 0.5, 0.0, 0.01) > 0
