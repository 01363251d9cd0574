"""The command `compare`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeAlias

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from concertina.cli.output import plain_console
from concertina.machine import cores_if_fewer
from export.comparison.compare import Entry, check_memories, configure
from export.comparison.compare import compare as compare_runs
from export.comparison.report import table, write_report
from model.config import ModelConfig, Positions
from model.data import load_dataset
from model.run import Progress as TrainProgress
from model.run import TrainConfig
from model.shown import Shows, in_lines
from model.stopping import on_signals
from model.train import Stopped

_Shown: TypeAlias = tuple[Callable[[str, int], None], Callable[[str, TrainProgress], None]]

_DEFAULT = (
    *("fixed@3", "full@3", "fixed:mean", "fixed:deepset-max", "logsparse"),
    *("logsparse-hierarchical", "axial-rowmajor", "axial-vertical", "axial-horizontal"),
    *("mixture", "mixture-averaged", "sparse-fixed", "sparse-strided", "sparse-logsparse"),
    "sparse-axial",
)


def compare(
    dataset: Annotated[Path, typer.Argument(help="Dataset made by `concertina data`.")],
    out: Annotated[Path, typer.Argument(help="Folder of the runs and the report.")],
    patterns: Annotated[
        list[str] | None,
        typer.Argument(
            help="`NAME`, `NAME:POOLING` or `NAME@SEEDS`; default: all (fixed, full: 3 seeds)."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Training tokens of each run.")] = 1_000_000,
    context: Annotated[
        int, typer.Option(min=1, help="Tokens per window (for images: their pixels).")
    ] = 1024,
    span: Annotated[
        int, typer.Option(min=1, help="Tokens per block (for images: their width).")
    ] = 32,
    width: Annotated[int, typer.Option(min=1, help="Width of the residual stream.")] = 128,
    layers: Annotated[int, typer.Option(min=1, help="Number of layers.")] = 4,
    heads: Annotated[int, typer.Option(min=1, help="Number of heads.")] = 4,
    mlp: Annotated[
        int,
        typer.Option(
            min=1, help="Width of the MLP; smaller for a pattern with weights of its own."
        ),
    ] = 512,
    positions: Annotated[Positions, typer.Option(help="Position embedding.")] = "factored",
    rows: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 8,
    rate: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 0.01,
    evaluations: Annotated[int, typer.Option(min=1, help="Points on the curve of a run.")] = 6,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 uses all cores.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Start even if memory seems to be too small.")
    ] = False,
) -> None:
    """Train patterns on the same data, tokens, seeds and number of weights, and compare them.

    Writes results.json, table.md, quality.svg (bits against time and against state) and cost.svg
    (operations and state against position). A stopped comparison continues; finished runs are kept.

    Examples:
    concertina compare data/emoji runs/compare-emoji
    concertina compare data/emoji runs/pools fixed@3 fixed:mean@3 fixed:deepset-max@3
    concertina compare data/python runs/long fixed full --context 4096 --span 64 --rows 2
    """
    console = plain_console(stderr=True)
    if threads := threads or cores_if_fewer():
        torch.set_num_threads(threads)
    loaded = load_dataset(dataset)
    info = loaded.info
    try:
        base = ModelConfig(
            vocabulary=info.vocabulary,
            starts=info.starts,
            context=context,
            width=width,
            layers=layers,
            heads=heads,
            mlp=mlp,
            span=span,
            positions=positions,
        )
        steps = TrainConfig(tokens=tokens, rows=rows).steps(context)
        every = max(1, steps // evaluations)
        budget = TrainConfig(tokens=tokens, rows=rows, rate=rate, evaluate_every=every)
        entries = [Entry.parse(pattern) for pattern in patterns or _DEFAULT]
        for entry in entries:
            configure(base, entry.variant)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not force:
        console.print("estimating the memory of the runs")
        check_memories(base, budget, entries, out)
    with on_signals() as request, _shown(console, info.unit, steps) as (start, show):
        try:
            results = compare_runs(loaded, base, budget, entries, out, show, request, start)
        except Stopped as stopped:
            console.print(str(stopped), markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(128 + request.signal) from None
    write_report(out, results, info.unit)
    plain_console().print(Markdown(table(results, info.unit)), soft_wrap=False)
    console.print(f"{out}: results.json, table.md, quality.svg, cost.svg")


@contextmanager
def _shown(console: Console, unit: str, steps: int) -> Iterator[_Shown]:
    """What to call when a run starts, and after each of its steps: bars, or lines for no terminal.

    steps: of each run.
    """
    if not console.is_terminal:
        runs: dict[str, Shows] = {}

        def begin(run: str, first: int) -> None:
            runs[run] = in_lines(console, unit, f"{run}: ")
            runs[run].start(run, first, steps)

        yield begin, lambda run, done: runs[run].step(done)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def start(run: str, first: int) -> None:
            tasks[run] = progress.add_task(run, total=steps, completed=first)

        def show(run: str, done: TrainProgress) -> None:
            text = f"{run}: {done.bits:.3f} {unit}"
            progress.update(tasks[run], completed=done.step, description=text)

        yield start, show
