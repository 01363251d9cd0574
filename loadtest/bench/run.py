"""Carries out a plan: in each cell, all contestants open at once and their windows in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from loadtest.bench.contestants import INSTALL
from loadtest.bench.plan import (
    ROOM,
    Cell,
    Contestant,
    Plan,
    cache_bytes,
    entrants,
    fits,
    needed_bytes,
    pack,
    span_of,
)
from loadtest.bench.process import Clock, Contender, Open
from loadtest.bench.rounds import Round, fastest, turns
from loadtest.bench.worker import FAILED, NOT_INSTALLED, OK, OUT_OF_MEMORY, Answer, Job

_OPENING = 0.3
"""Share of a group's time that passes until all have their context."""


@dataclass(frozen=True)
class Entry:
    """A contestant in a cell."""

    name: str
    outcome: str
    detail: str
    cache_bytes: int
    """Held for one stream; computed where nothing ran."""
    steps: int = 0
    """Of a window."""
    peak_bytes: int = 0
    busy_while_waiting: float = 0.0
    """Most processor time that it took in another's window, as a share of that window."""
    versions: str = ""
    """Of what computed."""


@dataclass(frozen=True)
class Group:
    """Contestants that were open at once, and their rounds."""

    names: tuple[str, ...]
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class CellResult:
    """All that was measured in a cell."""

    cell: Cell
    entries: tuple[Entry, ...]
    groups: tuple[Group, ...]
    others: float = 0.0
    """Cores that other programs used during the windows, on average."""


@dataclass(frozen=True)
class Report:
    """All measurements of a run."""

    plan: Plan
    results: tuple[CellResult, ...]


@dataclass(frozen=True)
class Progress:
    """Where a run stands, for whoever waits."""

    cell: int
    """Index of the cell."""
    what: str
    share: float
    """Of the cell, about."""


@dataclass
class _Table:
    """A cell while it is measured."""

    plan: Plan
    cell: Cell
    open_contender: Open
    folder: Path
    on_progress: Callable[[str, float], None]
    clock: Clock
    answers: dict[str, Answer] = field(default_factory=dict)
    """What last came from each contestant."""
    busy: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    windows_s: float = 0.0
    others_s: float = 0.0


def run(
    plan: Plan,
    open_contender: Open,
    folder: Path,
    on_progress: Callable[[Progress], None],
    clock: Clock | None = None,
    on_cell: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Measure everything in `plan`, with models below `folder`.

    A contestant that dies, hangs or is not there fails in its cell, and the others go on. on_cell
    gets what there is after each cell.
    """
    results: list[CellResult] = []
    for index, cell in enumerate(plan.cells):

        def say(what: str, share: float, index: int = index) -> None:
            on_progress(Progress(index, what, share))

        table = _Table(plan, cell, open_contender, folder, say, clock or Clock())
        results.append(_measure(table))
        on_cell(Report(plan, tuple(results)))
    return Report(plan, tuple(results))


def _measure(table: _Table) -> CellResult:
    contestants = entrants(table.plan, table.cell)
    for contestant in contestants:
        table.on_progress(f"model of {contestant.name}", 0.0)
        prepared = _prepare(table, contestant)
        table.answers[contestant.name] = prepared
        table.versions[contestant.name] = prepared.versions
    able = [c for c in contestants if table.answers[c.name].outcome == OK]
    groups: list[Group] = []
    if fits(table.plan, table.cell, able):
        groups.append(_in_turns(table, able, (0.0, 1.0)))
    elif able:
        groups += _in_parts(table, able)
    return CellResult(
        table.cell,
        tuple(_entry(table, each) for each in contestants),
        tuple(groups),
        table.others_s / table.windows_s if table.windows_s else 0.0,
    )


def _in_parts(table: _Table, able: list[Contestant]) -> list[Group]:
    """First our own settings, then the others, each beside our float32 and our best."""
    ours = [c for c in able if c.role == "ours"]
    others = [c for c in able if c.role != "ours"]
    small, parts = [], pack(table.plan, table.cell, ours, ())
    for part in parts:
        small.append(_in_turns(table, part, (0.0, 0.2)))
    anchors = _anchors(ours, small, table)
    for contestant in others:
        if not fits(table.plan, table.cell, [*anchors[-1:], contestant]):
            table.answers[contestant.name] = _no_room(table, contestant)
    others = [c for c in others if table.answers[c.name].outcome == OK]
    parts = pack(table.plan, table.cell, others, anchors)
    groups = list(small)
    for index, part in enumerate(parts):
        begin, step = 0.2 + 0.8 * index / len(parts), 0.8 / len(parts)
        groups.append(_in_turns(table, part, (begin, begin + step)))
    return groups


def _anchors(ours: list[Contestant], groups: list[Group], table: _Table) -> list[Contestant]:
    """Our float32 and our best, in this order; the best alone where that is float32."""
    open_ones = {c.name: c for c in ours if table.answers[c.name].outcome == OK}
    base = next((c.name for c in open_ones.values() if c.is_float32), next(iter(open_ones), ""))
    rounds = [each for group in groups for each in group.rounds]
    best = fastest(rounds, list(open_ones), base)
    return [open_ones[name] for name in dict.fromkeys((base, best)) if name in open_ones]


def _in_turns(
    table: _Table,
    contestants: Sequence[Contestant],
    share: tuple[float, float],
) -> Group:
    """Open all, then go round; who fails leaves the round and is not asked again."""
    begin, end = share
    plan, rounds = table.plan, list[Round]()
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for index, contestant in enumerate(contestants):
            done = begin + (end - begin) * _OPENING * index / len(contestants)
            table.on_progress(f"{contestant.name} computes its context", done)
            contender = _open(table, contestant, stack)
            if contender is not None:
                contenders[contestant.name] = contender
        wanted = plan.rounds_of(table.cell)
        for number in range(wanted):
            done = begin + (end - begin) * (_OPENING + (1 - _OPENING) * number / wanted)
            table.on_progress(f"round {number + 1} of {wanted}", done)
            windows: dict[str, list[float]] = {}
            # Every other round the other way round: a window that is short of time or memory right
            # after another's is not always the same one's.
            names = list(contenders)[:: -1 if number % 2 else 1]
            for name in turns(names):
                if name not in contenders:
                    continue
                table.clock.sleep(plan.settle_s)
                answer = _window(table, name, contenders)
                if answer.outcome == OK:
                    windows.setdefault(name, []).append(answer.step_s)
                else:
                    contenders.pop(name).close()
                    table.answers[name] = answer
            rounds.append({n: (w[0], w[1]) for n, w in windows.items() if len(w) == 2})
    return Group(tuple(c.name for c in contestants), tuple(rounds))


def _window(table: _Table, name: str, contenders: Mapping[str, Contender]) -> Answer:
    """One window, and what all others used of the processors meanwhile."""
    before = {each: contender.cpu_s() for each, contender in contenders.items()}
    busy, began = table.clock.busy_s(), table.clock.now()
    answer = contenders[name].ask("window", table.plan.window_limit_s)
    took = table.clock.now() - began
    busy = table.clock.busy_s() - busy
    used = {each: contenders[each].cpu_s() - before[each] for each in contenders}
    if answer.outcome != OK:
        return answer
    table.windows_s += took
    table.others_s += max(0.0, busy - sum(used.values()))
    for other in used.keys() - {name}:
        table.busy[other] = max(table.busy.get(other, 0.0), used[other] / took)
    kept = table.answers[name]
    table.answers[name] = replace(kept, peak_bytes=max(kept.peak_bytes, answer.peak_bytes))
    return answer


def _open(table: _Table, contestant: Contestant, stack: ExitStack) -> Contender | None:
    """The contestant at its context; None, and its answer noted, if it does not get there."""
    try:
        contender = table.open_contender(job_of(table.plan, table.cell, contestant, table.folder))
    except OSError as error:
        table.answers[contestant.name] = _not_started(error)
        return None
    stack.callback(contender.close)
    request = "open_prompt" if table.cell.first_token else "open"
    answer = contender.ask(request, table.plan.open_s)
    table.answers[contestant.name] = answer
    if answer.outcome == OK:
        return contender
    contender.close()
    return None


def _prepare(table: _Table, contestant: Contestant) -> Answer:
    if contestant.unable:
        return Answer(FAILED, contestant.unable)
    if not fits(table.plan, table.cell, [contestant]):
        return _no_room(table, contestant)
    try:
        contender = table.open_contender(job_of(table.plan, table.cell, contestant, table.folder))
    except OSError as error:
        return _not_started(error)
    try:
        return contender.ask("prepare", table.plan.open_s)
    finally:
        contender.close()


def _not_started(error: OSError) -> Answer:
    return Answer(NOT_INSTALLED, f"{error.filename}: {error.strerror}")


def _no_room(table: _Table, contestant: Contestant) -> Answer:
    needed = needed_bytes(table.plan.shape, contestant, table.cell)
    return Answer(
        OUT_OF_MEMORY,
        f"needs about {needed / 1e9:.1f} GB; all that is open at once may take "
        f"{table.plan.memory_bytes / 1e9:.1f} GB (--memory)",
    )


def job_of(plan: Plan, cell: Cell, contestant: Contestant, folder: Path) -> Job:
    """What a contestant's process is for in a cell."""
    context = contestant.at or cell.context
    span = span_of(contestant, context)
    model = [contestant.adapter, contestant.weights]
    if contestant.is_ours:  # a bundle has a context
        model += [contestant.state, str(context), str(span or "full")]
    return Job(
        adapter=contestant.adapter,
        mode=contestant.mode,
        weights=contestant.weights,
        state=contestant.state,
        folder=contestant.folder or str(folder / "-".join(model)),
        shape=plan.shape,
        context=context,
        streams=cell.streams,
        span=span,
        room=ROOM,
        threads=plan.threads,
        window_s=plan.window_s,
        memory_bytes=plan.memory_bytes,
        open_s=plan.open_s,
        source=contestant.source,
        device=plan.device,
    )


def _entry(table: _Table, contestant: Contestant) -> Entry:
    answer = table.answers[contestant.name]
    detail = answer.detail
    if answer.outcome == NOT_INSTALLED and contestant.adapter in INSTALL:
        detail = f"{detail}; {INSTALL[contestant.adapter]}"
    return Entry(
        contestant.name,
        answer.outcome,
        detail,
        answer.cache_bytes or cache_bytes(table.plan.shape, contestant, table.cell.context),
        answer.steps,
        answer.peak_bytes,
        table.busy.get(contestant.name, 0.0),
        table.versions.get(contestant.name, ""),
    )
