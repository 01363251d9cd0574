from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.scheduler import Load, Plan, next_credit, plan

EMPTY = Load(
    num_running=0,
    num_free=4,
    num_returning=0,
    waiting=(),
    bench_left=None,
    bench_joins=False,
    prefill_room=8,
    prefill_credit_s=0.0,
)
PROMPT, NO_PROMPT, SCORE = (20, True), (0, True), (20, False)


def _plan(**changes: object) -> Plan:
    return plan(replace(EMPTY, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ({}, Plan()),
        ({"waiting": (NO_PROMPT, NO_PROMPT)}, Plan(begin=2, decode=True)),
        ({"waiting": (PROMPT,)}, Plan(seat=True)),
        ({"waiting": (NO_PROMPT, PROMPT, NO_PROMPT)}, Plan(begin=1, seat=True, decode=True)),
        ({"num_free": 1, "waiting": (NO_PROMPT, PROMPT)}, Plan(begin=1, decode=True)),
        ({"num_free": 1, "waiting": (NO_PROMPT, SCORE)}, Plan(begin=1, seat=True, decode=True)),
        # Full: nobody joins, but scoring needs no slot.
        ({"num_free": 0, "num_running": 4, "waiting": (NO_PROMPT,)}, Plan(decode=True)),
        ({"num_free": 0, "num_running": 4, "waiting": (PROMPT,)}, Plan(decode=True)),
        ({"num_free": 0, "num_running": 4, "waiting": (SCORE,)}, Plan(seat=True, decode=True)),
        # The bench: pushed up to its block's end, then joins and makes room for the next.
        ({"bench_left": 20, "bench_joins": True}, Plan(prefill=8)),
        ({"bench_left": 5, "bench_joins": True}, Plan(prefill=5)),
        ({"bench_left": 0, "bench_joins": True}, Plan(join=True, decode=True)),
        (
            {"bench_left": 0, "bench_joins": True, "waiting": (PROMPT,)},
            Plan(join=True, seat=True, decode=True),
        ),
        (
            {"bench_left": 0, "bench_joins": True, "num_free": 0, "num_running": 4},
            Plan(decode=True),
        ),
        ({"bench_left": 20, "bench_joins": True, "waiting": (SCORE,)}, Plan(prefill=8)),
        # One slot is spoken for by whoever is on the bench.
        (
            {"num_free": 1, "num_running": 3, "bench_left": 9, "bench_joins": True,
             "waiting": (NO_PROMPT,)},
            Plan(decode=True),
        ),
        (
            {"num_free": 2, "num_running": 2, "bench_left": 9, "bench_joins": True,
             "waiting": (NO_PROMPT, NO_PROMPT)},
            Plan(begin=1, decode=True),
        ),
        (
            {"num_free": 1, "num_running": 3, "bench_left": 9, "bench_joins": False,
             "waiting": (NO_PROMPT,)},
            Plan(begin=1, decode=True),
        ),
        # Those who come back go before those who are new.
        (
            {"num_free": 1, "num_running": 3, "num_returning": 2, "bench_left": 0,
             "bench_joins": True, "waiting": (NO_PROMPT,)},
            Plan(restore=1, decode=True),
        ),
        # While somebody decodes, prefill has to have credit.
        (
            {"num_free": 3, "num_running": 1, "bench_left": 9, "bench_joins": True},
            Plan(decode=True),
        ),
        (
            {"num_free": 3, "num_running": 1, "bench_left": 9, "bench_joins": True,
             "prefill_credit_s": 1e-9},
            Plan(prefill=8, decode=True),
        ),
        ({"bench_left": 9, "bench_joins": True, "prefill_credit_s": -1.0}, Plan(prefill=8)),
    ],
)  # fmt: skip
def test_plan(load: dict[str, object], expected: Plan) -> None:
    assert _plan(**load) == expected


def test_only_an_empty_plan_is_idle() -> None:
    assert Plan().idle
    busy = (Plan(restore=1), Plan(begin=1), Plan(seat=True), Plan(join=True))
    assert not any(p.idle for p in (*busy, Plan(prefill=1), Plan(decode=True)))


@dataclass
class Job:
    """A stream to be: its prompt, its tokens, and after how many it pauses for how many turns."""

    number: int
    prompt: int
    score: bool
    tokens: int
    pauses_at: int | None
    away: int


@dataclass
class World:
    """What the engine does with a plan, with numbers in place of a model."""

    slots: int
    span: int
    waiting: deque[Job]
    running: list[Job] = field(default_factory=list)
    paused: list[Job] = field(default_factory=list)
    bench: Job | None = None
    pushed: int = 0
    credit_s: float = 0.0
    seated: list[int] = field(default_factory=list)

    def load(self) -> Load:
        return Load(
            num_running=len(self.running),
            num_free=self.slots - len(self.running),
            num_returning=sum(job.away <= 0 for job in self.paused),
            waiting=tuple((job.prompt, not job.score) for job in self.waiting)[: self.slots + 1],
            bench_left=None if self.bench is None else self.bench.prompt - self.pushed,
            bench_joins=self.bench is not None and not self.bench.score,
            prefill_room=self.span - self.pushed % self.span,
            prefill_credit_s=self.credit_s,
        )

    def execute(self, todo: Plan, decode_s: float, token_s: float) -> float:
        """Does one turn and returns how long its prefill took."""
        back = [job for job in self.paused if job.away <= 0][: todo.restore]
        self.paused = [job for job in self.paused if job not in back]
        self.running += back
        for _ in range(todo.begin):
            job = self.waiting.popleft()
            assert not job.prompt
            self.seated.append(job.number)
            self.running.append(job)
        if todo.join:
            assert self.bench is not None
            assert self.pushed == self.bench.prompt
            self.running.append(self.bench)
            self.bench = None
        if todo.prefill:
            assert self.bench is not None
            assert self.pushed // self.span == (self.pushed + todo.prefill - 1) // self.span
            self.pushed += todo.prefill
            if self.bench.score and self.pushed == self.bench.prompt:
                self.bench = None
        if todo.seat:
            assert self.bench is None
            self.bench, self.pushed = self.waiting.popleft(), 0
            self.seated.append(self.bench.number)
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


@st.composite
def jobs(draw: st.DrawFn) -> list[Job]:
    count = draw(st.integers(1, 12))
    prompts = st.sampled_from([0, 0, 1, 3, 7, 8, 9, 30])
    made = []
    for number in range(count):
        prompt, score = draw(prompts), draw(st.booleans())
        tokens = draw(st.integers(1, 12))
        pauses_at = draw(st.none() | st.integers(1, 11))
        made.append(
            Job(number, prompt, score and prompt > 0, tokens, pauses_at, draw(st.integers(0, 9)))
        )
    return made


@given(jobs(), st.integers(1, 4), st.integers(1, 9), st.floats(0, 3))
def test_everybody_is_served_in_order(
    jobs: list[Job], slots: int, span: int, token_s: float
) -> None:
    world = World(slots, span, deque(jobs))
    for _ in range(5000):
        load = world.load()
        todo = plan(load)
        if todo.idle:
            # With nobody running there is no reason to wait for anybody but a reader.
            assert not world.running
            assert not world.waiting
            assert world.bench is None
            assert load.num_returning == 0
            if not world.paused:
                break
        assert todo.restore + todo.begin + todo.join <= load.num_free
        world.execute(todo, decode_s=1.0, token_s=token_s)
    else:
        raise AssertionError(f"not done after 5000 turns: {world}")
    assert world.seated == sorted(world.seated)
    assert len(world.seated) == len(jobs)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75])
def test_prefill_gets_its_share_of_the_time(share: float) -> None:
    """Endless prompts beside endless streams; a chunk takes three times a decode step."""
    credit_s = prefill_s = decode_s = 0.0
    for _ in range(3000):
        todo = _plan(
            num_running=3, num_free=1, bench_left=8, bench_joins=True, prefill_credit_s=credit_s
        )
        assert todo.decode
        spent = 0.03 if todo.prefill else 0.0
        credit_s = next_credit(credit_s, share, spent, 0.01)
        prefill_s += spent
        decode_s += 0.01
    assert prefill_s / (prefill_s + decode_s) == pytest.approx(share, rel=0.02)


def test_credit_that_nobody_used_does_not_become_a_burst() -> None:
    credit_s = 0.0
    for _ in range(1000):
        credit_s = next_credit(credit_s, 0.5, 0.0, 0.01)
    assert 0 < credit_s <= 0.01


def test_prefill_that_kept_nobody_waiting_is_not_held_against_it() -> None:
    """After a long prompt on an empty engine, the next prompt must not wait as long again."""
    credit_s = 0.0
    for _ in range(100):
        credit_s = next_credit(credit_s, 0.5, 1.0, 0.0)
    assert next_credit(credit_s, 0.5, 0.0, 0.01) > 0
