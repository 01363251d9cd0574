"""A progress bar on stderr."""

from __future__ import annotations

import asyncio
from time import perf_counter

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from concertina.cli.output import plain_console
from loadtest.target import Tally

_REFRESH_S = 0.25


async def show_progress(
    phase: str, tally: Tally, *, requests: int | None, duration_s: float | None
) -> None:
    """Draws the bar until the calling task is cancelled; nothing where there is no terminal.

    The bar fills with the requests that ended, or with time if their number is not known.
    """
    console = plain_console(stderr=True)
    if not console.is_terminal:
        return
    columns = (
        TextColumn(phase),
        BarColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        TimeElapsedColumn(),
    )
    # Drawn from this task: a thread of its own would hold the event loop back at any moment.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        bar = progress.add_task(phase, total=requests or duration_s, status="")
        started = perf_counter()
        while True:
            await asyncio.sleep(_REFRESH_S)
            elapsed = perf_counter() - started
            progress.update(
                bar,
                completed=tally.ended if requests else elapsed,
                status=f"{tally.running} streams, {tally.tokens / elapsed:,.0f} tokens/s",
                refresh=True,
            )
