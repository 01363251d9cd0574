"""Standard input, output and error, however they are set up; and how texts and tables go there."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

_WIDEST: Final = 10_000
LINE_EVERY_S: Final = 10.0
_STANDARD: Final = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def plain_console(stderr: bool = False) -> Console:
    """A console that prints texts as they are: a name may look like markup, and is none."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_whole(shown: RenderableType) -> None:
    """Prints a table; where no terminal limits it, as wide as it is: a name that is cut is none."""
    console = plain_console()
    if not console.is_terminal:
        widest = console.options.update(max_width=_WIDEST)
        console.width = max(console.width, Measurement.get(console, widest, shown).maximum)
    console.print(shown, soft_wrap=False)


@contextmanager
def counted(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """Shows on standard error how many of `total` are done: each call counts one, with a note.

    A terminal has a bar, which goes when all is done; anything else a line every ten seconds.
    """
    console = plain_console(stderr=True)
    if console.is_terminal:
        columns = (MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
        with Progress(
            *columns, BarColumn(), TimeRemainingColumn(), console=console, transient=True
        ) as bar:
            task = bar.add_task(what, total=total)
            yield lambda note: bar.update(task, advance=1, description=f"{what}, {note}")
        return
    done, began = 0, time.monotonic()
    said = began

    def count(note: str) -> None:
        nonlocal done, said
        done, now = done + 1, time.monotonic()
        if now - said >= LINE_EVERY_S:
            said, left = now, timedelta(seconds=round((total - done) * (now - began) / done))
            console.print(f"{done:,} of {total:,} {what}, {note}, {left} left")

    yield count


def open_standard_streams() -> None:
    """Opens nothing where a standard stream is closed, and replaces what cannot be shown.

    Must be called before anything is opened: a connection would get the number of a closed stream,
    and what is printed would go there.
    """
    for name, mode in _STANDARD:
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            setattr(sys, name, os.fdopen(nothing, mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def flush_output() -> None:
    """Writes what standard output still holds. If that fails, drops it, and raises OSError."""
    try:
        sys.stdout.flush()
    except OSError:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())  # else Python tries again when it ends, and complains
        os.close(nothing)
        raise
