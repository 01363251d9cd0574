"""What a person sees of a run: a bar on a terminal, and lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from model.run import Progress

_LINE_EVERY_S = 10.0


@dataclass(frozen=True)
class Shows:
    """Where a run tells what it does."""

    say: Callable[[str], None]
    start: Callable[[str | Path, int, int], None]
    """Called with the run's folder or name, the steps done already, and all steps."""
    step: Callable[[Progress], None]


@contextmanager
def shown(console: Console, unit: str) -> Iterator[Shows]:
    """Shows a run on `console`; `unit` is that of its loss."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=console) as bar:
            yield _on_bar(bar, unit)
    else:
        yield in_lines(console, unit)


def _on_bar(bar: Bar, unit: str) -> Shows:
    task = bar.add_task("starting", total=None)

    def say(text: str) -> None:
        bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(run: str | Path, first: int, steps: int) -> None:
        bar.update(task, total=steps, completed=first)
        say(_beginning(run, first, steps))

    def step(done: Progress) -> None:
        text = f"{done.bits:.3f} {unit}, {done.tokens_per_second:,.0f} tokens/s"
        bar.update(task, completed=done.step, description=text)
        if done.heldout is not None:
            say(f"step {done.step}: {done.heldout:.4f} {unit} held out")

    return Shows(say, start, step)


def in_lines(console: Console, unit: str, name: str = "") -> Shows:
    """Shows a run in lines; those of its steps begin with `name`."""
    first_step, began, last_line = 0, time.monotonic(), 0.0

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(run: str | Path, first: int, steps: int) -> None:
        nonlocal first_step, began
        first_step, began = first, time.monotonic()
        say(_beginning(run, first, steps))

    def step(done: Progress) -> None:
        nonlocal last_line
        now = time.monotonic()
        rare = last_line and now - last_line < _LINE_EVERY_S
        if rare and done.heldout is None and done.step < done.steps:
            return
        last_line = now
        here = max(1, done.step - first_step)
        left = timedelta(seconds=round((done.steps - done.step) * (now - began) / here))
        heldout = "" if done.heldout is None else f", {done.heldout:.4f} {unit} held out"
        say(
            f"{name}step {done.step} of {done.steps}: {done.bits:.3f} {unit}{heldout}, "
            f"{done.tokens_per_second:,.0f} tokens/s, {left} left"
        )

    return Shows(say, start, step)


def _beginning(run: str | Path, first: int, steps: int) -> str:
    if first == steps:
        return f"{run}: all {steps} steps are done already"
    if first:
        return f"{run}: resumed at step {first} of {steps}"
    return f"{run}: {steps} steps from the beginning"
