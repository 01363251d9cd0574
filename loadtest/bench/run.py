"""Carries out a plan: one process at a time, contestants in turns, a median for every cell."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import loadtest
from loadtest.bench.plan import (
    ROOM,
    Cell,
    Contestant,
    Plan,
    cache_bytes,
    needed_bytes,
    rounds_of,
    span_of,
    takes_part,
)
from loadtest.bench.worker import FAILED, NOT_INSTALLED, OK, OUT_OF_MEMORY, Job, Outcome

# Our folders come last, so that the peers' own packages are found first.
_BOOT = (
    "import runpy, sys; sys.path += {paths!r}; "
    "runpy.run_module('loadtest.bench.worker', run_name='__main__', alter_sys=True)"
)


@dataclass(frozen=True)
class Result:
    """Figures of a contestant in a cell, over all rounds."""

    contestant: str
    context: int
    streams: int
    span: int | None
    outcome: str
    detail: str
    tokens_per_s: float | None
    """Median over the windows of all rounds."""
    windows: tuple[float, ...]
    cache_bytes: int
    """Held for one stream; computed where nothing ran."""


@dataclass(frozen=True)
class FirstToken:
    """Seconds from a prompt to its first token, over all rounds."""

    contestant: str
    prompt: int
    outcome: str
    detail: str
    seconds: float | None
    """Median."""
    runs: tuple[float, ...]


@dataclass(frozen=True)
class Report:
    """All measurements of a run."""

    plan: Plan
    results: tuple[Result, ...]
    first_tokens: tuple[FirstToken, ...]


Measure = Callable[[Contestant, Job], Outcome]


def run(plan: Plan, measure: Measure, folder: Path, on_job: Callable[[str], None]) -> Report:
    """Measure everything in `plan` with models below `folder`.

    A contestant that is not installed, or failed in a cell, is not tried there again.
    """
    results = []
    for cell in plan.cells:
        here = [c for c in plan.contestants if takes_part(c, cell.context)]
        outcomes = _in_turns(plan, here, cell, "decode", measure, folder, on_job)
        results += [_result(plan, c, cell, outcomes[c.name]) for c in here]
    firsts: list[FirstToken] = []
    if plan.first_token:
        here = [c for c in plan.contestants if c.first_token]
        cell = Cell(plan.prompt, 1)
        outcomes = _in_turns(plan, here, cell, "first_token", measure, folder, on_job)
        firsts = [_first_token(c, plan.prompt, outcomes[c.name]) for c in here]
    return Report(plan, tuple(results), tuple(firsts))


def in_process(peer_python: str, limit_s: float) -> Measure:
    """Measures in processes: ours with this Python, the peers with `peer_python`."""

    def measure(contestant: Contestant, job: Job) -> Outcome:
        paths = [str(Path(path).parent) for path in loadtest.__path__]
        command = [peer_python, "-c", _BOOT.format(paths=paths), str(job)]
        if not contestant.is_peer:
            command = [sys.executable, "-m", "loadtest.bench.worker", str(job)]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return Outcome(FAILED, f"took more than {limit_s:.0f} s")
        except OSError as error:
            return Outcome(FAILED, f"{peer_python}: {error.strerror}")
        lines = ran.stdout.strip().splitlines()
        if ran.returncode == 0 and lines:
            return Outcome.parse(lines[-1])
        if ran.returncode == -9 or "bad_alloc" in ran.stderr:
            return Outcome(OUT_OF_MEMORY, "the process was killed")
        last = (ran.stderr.strip().splitlines() or [""])[-1]
        return Outcome(FAILED, f"exit code {ran.returncode}: {last[:300]}")

    return measure


def _in_turns(
    plan: Plan,
    contestants: list[Contestant],
    cell: Cell,
    task: str,
    measure: Measure,
    folder: Path,
    on_job: Callable[[str], None],
) -> dict[str, list[Outcome]]:
    outcomes: dict[str, list[Outcome]] = {}
    for contestant in contestants:
        on_job(f"{contestant.title}, {cell}, model")
        job = _job(plan, contestant, cell, "prepare", folder)
        outcomes[contestant.name] = _refusal(plan, contestant, cell, measure(contestant, job))
    for number in range(plan.rounds):
        # Every other round in reverse, so that none always follows the same one.
        for contestant in contestants[:: -1 if number % 2 else 1]:
            seen = outcomes[contestant.name]
            left = number < rounds_of(plan, contestant, cell)
            if left and all(outcome.outcome == OK for outcome in seen):
                on_job(f"{contestant.title}, {cell}, {task.replace('_', ' ')}, round {number + 1}")
                seen.append(measure(contestant, _job(plan, contestant, cell, task, folder)))
    return outcomes


def _refusal(plan: Plan, contestant: Contestant, cell: Cell, prepared: Outcome) -> list[Outcome]:
    """Why a contestant cannot run, as its only outcome; nothing when it can."""
    if prepared.outcome != OK:
        return [prepared]
    needed = needed_bytes(plan.shape, contestant, cell)
    if needed <= plan.memory_bytes:
        return []
    gigabytes = f"needs about {needed / 1e9:.1f} GB, may take {plan.memory_bytes / 1e9:.1f} GB"
    return [Outcome(OUT_OF_MEMORY, gigabytes)]


def _job(plan: Plan, contestant: Contestant, cell: Cell, task: str, folder: Path) -> Job:
    span = span_of(contestant, cell.context)
    model = "-".join([contestant.adapter, contestant.variant])
    if not contestant.is_peer:  # a bundle has a context
        model = f"{contestant.adapter}-{cell.context}-{span or 'full'}"
    return Job(
        task=task,
        adapter=contestant.adapter,
        variant=contestant.variant,
        packages=contestant.packages,
        folder=str(folder / model.rstrip("-")),
        shape=plan.shape,
        context=cell.context,
        streams=cell.streams,
        span=span,
        room=ROOM,
        threads=plan.threads,
        windows=plan.windows,
        window_s=plan.window_s,
        memory_bytes=plan.memory_bytes,
    )


def _result(plan: Plan, contestant: Contestant, cell: Cell, outcomes: list[Outcome]) -> Result:
    last = outcomes[-1]
    windows = tuple(rate for outcome in outcomes for rate in outcome.tokens_per_s)
    held = last.cache_bytes or cache_bytes(plan.shape, contestant, cell.context)
    return Result(
        contestant.name,
        cell.context,
        cell.streams,
        span_of(contestant, cell.context),
        last.outcome,
        _detail(contestant, last),
        statistics.median(windows) if windows else None,
        windows,
        held,
    )


def _first_token(contestant: Contestant, prompt: int, outcomes: list[Outcome]) -> FirstToken:
    last = outcomes[-1]
    runs = tuple(o.first_token_s for o in outcomes if o.first_token_s is not None)
    return FirstToken(
        contestant.name,
        prompt,
        last.outcome,
        _detail(contestant, last),
        statistics.median(runs) if runs else None,
        runs,
    )


def _detail(contestant: Contestant, outcome: Outcome) -> str:
    return contestant.install if outcome.outcome == NOT_INSTALLED else outcome.detail
